"""What a run has learned, in a sentence: the first thing that its page says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from review.readers.control_result import GRPO, REJECTION, SUPERVISED, WAYS, ControlResult, Measured, Policy
from review.statistics.estimates import difference_interval
from rewards.verdicts import ACCURACY, held_out_metric, judged_problems

TRAINED = "reward/mean"
SAME_SECONDS = 0.1  # controls get GRPO's seconds in whole steps, so theirs differ by a few percent
CONTROLS = {SUPERVISED: "the best supervised control", REJECTION: "rejection sampling"}
NO_LIMITS = "rewards have no limits and a few problems may decide their mean"
AVERAGED = 10  # training steps at each end of a run without evaluations


def headline(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for sampled and one for greedy evaluations; without any, one about the reward in training.

    >>> headline([{"step": step, "eval/accuracy": share, "eval/prompts": 10} for step, share in ((0, 0.2), (9, 0.5))])
    ['Held out, sampled: accuracy 0.200 at step 0, 0.500 at step 9, on 10 problems. The difference is +0.300 ...']
    """
    metric, sentences = held_out_metric(rows), []
    for name, how in ((metric, "sampled"), (f"{metric}_greedy", "greedy")):
        if evaluated := [row for row in rows if row.get(name) is not None]:
            sentences.append(_evaluated(evaluated, name, f"Held out, {how}"))
    return sentences or _trained(rows)


def control_sentences(control: ControlResult) -> list[str]:
    """Returns a sentence for each control: how far GRPO is above it. By the sampled answers, if there are any.

    >>> control_sentences(read_control(Path("runs/demo")))[0]
    'GRPO is above the best supervised control by +0.40 (95 %: +0.35 to +0.45) on the same 512 problems in the same ...'
    """
    sentences = []
    for kind, name in CONTROLS.items():
        policy = control.policies.get(kind)
        way = next((way for way in WAYS if policy and way in policy.grpo_minus), None)
        if policy and way:
            place = f"on the same {control.problems:,} problems {_seconds(control.policies[GRPO], policy)}"
            sentences.append(_above(name, policy.grpo_minus[way], place))
    return sentences


def _above(name: str, difference: Measured, place: str) -> str:
    value, low, high = difference.value, difference.low, difference.high
    if low is None or high is None:
        return f"GRPO minus {name} is {value:+.2f} {place}; the difference has no interval."
    size = f"{value:+.2f} (95 %: {low:+.2f} to {high:+.2f})"
    if low > 0:
        return f"GRPO is above {name} by {size} {place}."
    if high < 0:
        return f"GRPO is below {name}: the difference is {size} {place}."
    return f"GRPO minus {name} is {size} {place}; it may be chance."


def _seconds(grpo: Policy, control: Policy) -> str:
    if abs(control.seconds - grpo.seconds) <= SAME_SECONDS * grpo.seconds:
        return "in the same seconds"
    return f"after {grpo.seconds:,.0f} s of GRPO and {control.seconds:,.0f} s of the control"


def _evaluated(rows: Sequence[Mapping[str, Any]], name: str, what: str) -> str:
    first, last = rows[0], rows[-1]
    judged = name.startswith(ACCURACY)
    count, before = (judged_problems(row) if judged else row.get("eval/prompts") or 0 for row in (last, first))
    sentence = f"{what}: {'accuracy' if judged else 'mean reward'} {first[name]:.3f} at step {first['step']}"
    on = f", on {count:g} problems" if count else ""
    if last is first:
        return f"{sentence}{on}. There is no later evaluation yet."
    sentence += f", {last[name]:.3f} at step {last['step']}{on}. The difference is {last[name] - first[name]:+.3f}"
    if not (judged and count and before):
        why = "some completions have no mark" if judged else NO_LIMITS
        return f"{sentence}; it has no interval, since {why}."
    low, high = difference_interval(first[name], last[name], (before, count))
    verdict = "so it has learned" if low > 0 else "so it has become worse" if high < 0 else "which may be chance"
    return f"{sentence} (95 %: {low:+.3f} to {high:+.3f}), {verdict}."


def _trained(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rewards = [row[TRAINED] for row in rows if row.get(TRAINED) is not None]
    if len(rewards) < 2:
        return []
    each = min(AVERAGED, len(rewards) // 2)
    first, last = fmean(rewards[:each]), fmean(rewards[-each:])
    steps = "step" if each == 1 else f"{each} steps"
    return [f"In training: mean reward {first:.3f} in the first {steps}, {last:.3f} in the last. Nothing was held out."]
