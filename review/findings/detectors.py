"""Each detector looks for one cause because of which a run does not learn. It tells whether that is there, what is
wrong with the number it rests on, and what to change. Causes stand before their consequences, which they explain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from review.findings import gains
from review.findings.alarms import FEATURES, SAID, SUSPECTS, Moments, compared, judged
from review.findings.gains import Cause
from review.readers.gains import label_of
from review.readers.record import FEW, Group, Record, answer_text
from review.readers.run_folder import TURNS
from review.statistics.estimates import mean_interval
from rewards.built_in.gsm8k import MARKED
from rewards.config.names import recorded_options, sources_of
from rewards.ties import tied as is_tied

LEAST_STEPS = 3  # of which a correlation or a movement is believed
FAILING = 0.01  # of the completions, from which on failed rewards are a cause
SURE = 0.75  # of the completions of a group give one answer
SPECIAL = re.compile(r"(?:<\|[^|<>\s]{1,30}\|>|</s>|<eos>|<end_of_turn>)\s*[^\s<]")  # with text after it
FORMS = ("gsm8k", "gsm8k_flexible", "gsm8k_boxed", "gsm8k_lm_eval")  # rewards by which a text may have no answer


def failed(record: Record) -> Cause:
    end: dict[str, Any] = next((event for event in reversed(record.events) if event["event"] in TURNS), {})
    what = f"The run ended with an error after step {end.get('after_step') or 0}: {end.get('error')}."
    return end.get("how") == "failed", what, "mend that first, and go on with --resume auto, or begin again"


def unmarked(record: Record) -> Cause:
    lost, errors = record.mean("reward/abstained"), sum(record.series("reward/errors"))
    what = f"{lost:.0%} of the completions have no mark, and rewards failed {errors:.0f} times."
    change = "see reward_error in events.jsonl, and try the reward: quartet reward test"
    return lost > 0.05 or errors > FAILING * record.completions, what, change


def temperature(record: Record) -> Cause:
    alike = record.share(record.groups, lambda group: group.is_one_text)
    is_cold = float(record.options.get("rollout.temperature") or 1.0) < 0.3
    what = f"In {alike:.0%} of the groups all completions are the same text, so that none can be better than another."
    return alike > 0.9 and is_cold, what, f"raise {record.option('rollout.temperature')} to 1"


def rate_high(record: Record) -> Cause:
    """A step that moves the policy by many nats a completion throws away what the policy could do."""
    step, nats = max(record.moves.items(), key=lambda move: move[1], default=(0, 0.0))
    before, after, z = record.rise
    what = f"Step {step} moved the policy by a KL of {nats:.3g} nats a completion, where one or two are many, and the "
    what += f"marks went from {before:.3g} to {after:.3g}."
    change = f"lower {record.option('learner.learning_rate')}, {_factor(nats**0.5)} times perhaps"
    is_no_gain = z < 2 if record.has_rise else after <= before
    return nats > 5 and (is_no_gain if nats > 30 else z < -3), what, change


def _factor(value: float) -> int:
    """The power of ten nearest to the value, 10 at least."""
    return 10 ** max(1, round(math.log10(max(value, 1.0))))


def stop_token(record: Record) -> Cause:
    lines = [line for group in record.groups for line in group.lines] or [{"text": ""}]
    cut = fmean(line.get("finish_reason") == "length" for line in lines)
    texts = [answer_text(line) for line in lines]
    on = fmean(len(MARKED.findall(text)) > 1 or bool(SPECIAL.search(text)) for text in texts)
    what = f"{cut:.0%} of the completions were cut, and {on:.0%} go on after their answer or after a stop token."
    change = "name the token that ends an answer as eos_token_id in generation_config.json of"
    return cut > 0.5 and on > 0.5, what, f"{change} {record.option('model')}"


def sign_flipped(record: Record) -> Cause:
    what = f"Wrong answers get the better marks: inside groups being right and the score have r = {record.right:+.2f}."
    return record.right < -0.6, what, "turn the sign of the reward, or of its weight in rewards"


def reward_constant(record: Record) -> Cause:
    """All completions have the same mark though some are right and some are wrong."""
    mark, wrong = record.marks[0] if record.marks else 0.0, record.wrong_at_best
    agree = fmean([group.majority[1] for group in record.groups] or [1.0])
    what = f"All {len(record.marks)} completions got the mark {mark:g} of {record.first_reward}, and "
    if wrong is None:
        differ = mark not in (0.0, 1.0) or (mark == 1.0 and agree < 0.8)
        what += f"of a group {agree:.0%} give the same answer."
    else:
        differ = wrong > 0.1 if mark > 0 else wrong < 0.9
        what += f"{1 - wrong:.0%} of them are right by the gold answers."
    is_one = len(record.groups) >= FEW and is_tied([min(record.marks), max(record.marks)])
    is_one = is_one and not record.learns_by_others
    return is_one and differ, what, f"mend the reward: quartet reward test {record.rewards[0].get('function')}"


def template(record: Record) -> Cause:
    """The policy was taught with prompts of another form, or does not write what the reward reads."""
    ours, model = record.options.get("data.template"), Path(str(record.options.get("model")))
    theirs = _template_of_run(model)
    if theirs and ours and theirs != ours and record.start < 0.6:
        what = f"Prompts are {ours!r}, {model} was taught with {theirs!r}, and it begins with "
        what += f"{record.start:.0%} of the marks."
        return True, what, f"set data.template to {theirs!r}"
    none = record.share(record.early, lambda group: group.majority[0] is None)
    what = f"In {none:.0%} of the groups most completions have no answer in the form that {record.first_reward} reads."
    change = f"show the form in {record.option('data.template')} or by data.few_shot, or teach it by sft.steps; "
    reads_a_form = record.rewards[0].get("function") in FORMS
    return none > 0.7 and reads_a_form, what, change + "a chat model needs data.template: chat"


def _template_of_run(model: Path) -> str | None:
    """The template of the run that the policy comes from; None for one that comes from no run."""
    files = [folder / "config.yaml" for folder in (model, model.parent) if (folder / "config.yaml").is_file()]
    return sources_of(recorded_options(files[0])[1])[0].get("template") if files else None


def answer_column(record: Record) -> Cause:
    """An answer that nearly all completions of a group give is right more often than not, if gold answers are."""
    sure = [group for group in record.early if group.majority[0] is not None and group.majority[1] >= SURE]
    right = fmean([group.mark_of_majority for group in sure] or [1.0])
    what = f"In {len(sure)} of {len(record.early)} groups {SURE:.0%} or more of the completions give one and the same "
    what += f"answer, and in {right:.0%} of them it is the gold one: gold answers are hardly those of the problems."
    change = f"compare them: {record.option('data.solution_column')}, the reward, the rows of the data"
    are_many = len(sure) >= max(FEW, 0.35 * len(record.early)) and set(record.marks) <= {0.0, 1.0}
    return are_many and right < 0.3, what, change


def all_solved(record: Record) -> Cause:
    right = record.share(record.early, lambda group: group.all_have(record.top))
    what = f"From the start on {right:.0%} of the groups get full marks alone, and the run begins with "
    what += f"{record.start:.0%} of all marks: there is little left to learn."
    change = f"take harder problems: {_data(record)}"
    return right > 0.7 and record.start > 0.9 and not record.learns_by_others, what, change


def none_solved(record: Record) -> Cause:
    low = min(record.marks, default=0.0)
    none = record.share(record.groups, lambda group: group.all_have(low))
    what = f"In {none:.0%} of the groups no completion gets more than {low:g}, so that none is better than another."
    change = f"take easier problems: {_data(record)}; or sft.steps, or a reward with parts; see that a gold "
    change += "solution gets full marks: quartet reward test"
    return none > 0.9 and low < record.top and not record.learns_by_others, what, change


def _data(record: Record) -> str:
    made = record.options.get("data.name") == "word_problems"
    return record.option("data.task_options.levels" if made else "data.name")


def hacked(record: Record) -> Cause:
    """The alarms of the run, over all of its steps."""
    each = {kind: record.series(*record.watched(kind)) for kind in (*FEATURES, "format")}
    values = {kind: median(series) for kind, series in each.items() if len(series) >= LEAST_STEPS}
    by_chance = {kind for kind in SUSPECTS if not _differs_from_zero(each[kind])}
    values = compared({kind: value for kind, value in values.items() if kind not in by_chance})
    kind = judged(values) if len(set(record.marks)) > 1 else None
    change = "pay for the answer: a reward that compares it with the gold one, with the largest weight in rewards"
    return kind is not None, f"The score {SAID[kind].format(value=values[kind])}." if kind else "", change


def _differs_from_zero(values: list[float]) -> bool:
    low, high = mean_interval(values) or (0.0, 0.0)
    return low > 0 or high < 0


def group_size(record: Record) -> Cause:
    size, ties = int(record.options.get("rollout.group_size") or 8), record.mean("group/zero_variance")
    what = f"Groups have {size} completions, and {ties:.0%} of them have zero variance."
    stands_still = record.has_rise and record.rise[2] <= 2
    is_there = size < 4 and (stands_still or (ties > 0.5 and not record.has_rise))
    return is_there, what, f"raise {record.option('rollout.group_size')}, to 8 perhaps"


def tied(record: Record) -> Cause:
    """The marks of nearly all groups are equal, some at the top and some at the bottom."""
    ties = record.mean("group/zero_variance")
    notice = next((event for event in record.events if event["event"] == "nothing_learned"), {})
    why = notice.get("why") or "some problems are too easy and others too hard"
    ways: list[str] = notice.get("change") or [
        "leave out problems that are always or never solved",
        f"raise {record.option('rollout.group_size')}",
    ]
    return ties > 0.9, f"{ties:.0%} of the groups have zero variance and teach nothing: {why}.", "; ".join(ways)


def rate_low(record: Record) -> Cause:
    """A step of this KL changes the probability of any event by √(KL / 2) at most (Pinsker's inequality), and several
    steps by no more than the sum."""
    steps = max(int(record.options.get("steps") or 0), record.steps)
    bound = math.fsum(math.sqrt(nats / 2) for nats in record.moves.values()) * steps / max(record.steps, 1)
    what = f"Nothing moves: all {steps} steps together can change the share of right answers by {bound:.1%} at most."
    change = f"raise {record.option('learner.learning_rate')}, {_factor(1 / max(bound, 1e-9))} times perhaps"
    return len(record.moves) >= LEAST_STEPS and bound < 0.2, what, change


def other_part(record: Record) -> Cause:
    """What differs inside groups, and is learned, is another part of the score than the first."""
    names = list(map(label_of, record.rewards))
    r = {name: _correlation(record.groups, name) for name in names}
    first, other = names[0], max(names, key=lambda name: r[name])
    what = f"Inside groups the score goes with {other} (r = {r[other]:.2f}), and not with {first} (r = {r[first]:.2f})."
    change = f"lower the weight of {other} in rewards, or begin with problems for which {first} differs"
    return r[other] > 0.7 and r[first] < 0.3 and not record.learns_by_others, what, change


def _correlation(groups: list[Group], name: str) -> float:
    """Correlates a part with the score inside groups; 0 where it differs in fewer than FEW groups."""
    total = Moments()
    for group in groups:
        pairs = [(line.get("reward"), line["parts"].get(name)) for line in group.lines]
        total += Moments.of([(score, part) for score, part in pairs if score is not None and part is not None])
    return (total.r or 0.0) if total.groups >= FEW else 0.0


def noise(record: Record) -> Cause:
    marks: dict[tuple[str, str], list[float]] = {}
    for group in record.groups:
        for line, mark in zip(group.lines, group.marks, strict=True):
            marks.setdefault((line["prompt_id"], line["text"]), []).append(mark)
    apart = [max(values) - min(values) for values in marks.values() if len(values) > 1]
    differ = [difference for difference in apart if difference > 1e-6]
    what = f"Of {len(apart)} texts that came twice or more for one prompt {len(differ)} got different marks, by "
    what += f"{fmean(differ or [0.0]):.3g} on average."
    change = "make rewards give one text one mark, by fixed seeds or a judge at temperature 0"
    return len(apart) >= FEW and len(differ) > 0.1 * len(apart), what, change


def tiny_differences(record: Record) -> Cause:
    """Marks that differ in the third digit become as large as real differences, divided by their spread."""
    spreads = [max(group.marks) - min(group.marks) for group in record.groups if not is_tied(group.marks)]
    size = max(map(abs, record.marks), default=0.0)
    small = fmean(spread < size / 100 for spread in spreads) if len(spreads) >= FEW else 0.0
    what = f"In {small:.0%} of the groups whose marks differ they differ by less than a hundredth of {size:.3g}."
    return small > 0.5, what, f"round the reward, or set {record.option('loss.scale_rewards')} to none"


def weights(record: Record) -> Cause:
    usual = {"mismatch/weight_mean": 1.0, "policy/ratio_mean": 1.0, "mismatch/logprob_abs_mean": 0.0}
    off = {name: abs(median(record.series(name) or [value]) - value) for name, value in usual.items()}
    name = max(off, key=lambda name: off[name])
    what = f"{name} is {off[name]:.3g} away from {usual[name]:g}: the completions are of another policy than the one "
    ways = map(record.option, ("rollout.staleness", "learner.updates_per_batch", "rollout.quantization"))
    change = f"lower {', '.join(ways)}, or see why sampler and learner differ (mismatch/*)"
    return off[name] > 0.2, what + "that learns from them.", change


def entropy(record: Record) -> Cause:
    late = record.groups[len(record.groups) // 2 :]
    one = record.share(late, lambda group: group.is_one_text and not group.all_have(record.top))
    values = record.series("policy/entropy") or [0.0]
    what = f"In {one:.0%} of the later groups all completions are one text without full marks; the entropy went from "
    what += f"{values[0]:.3g} to {values[-1]:.3g} nats a token."
    return one > 0.5, what, f"raise {' or '.join(map(record.option, ('rollout.temperature', 'loss.entropy_coef')))}"


def clipped(record: Record) -> Cause:
    values = record.series("completion/truncated")
    cut = fmean(values[len(values) // 2 :] or [0.0])
    change = f"raise {record.option('rollout.max_completion_tokens')}, or pay for brevity by a second reward"
    return cut > 0.25, f"{cut:.0%} of the later completions are cut before their end.", change


def evaluation(record: Record) -> Cause:
    return gains.evaluation(record.gains)


def training_only(record: Record) -> Cause:
    return gains.training_only(record.gains)


def rate_decay(record: Record) -> Cause:
    return gains.rate_decay(record.gains)


DETECTORS: tuple[Callable[[Record], Cause], ...] = (
    *(failed, unmarked, temperature, rate_high, stop_token, sign_flipped, reward_constant, template, answer_column),
    *(all_solved, none_solved, hacked, group_size, tied, rate_low, other_part, noise, tiny_differences, weights),
    *(entropy, clipped, evaluation, training_only, rate_decay),
)
TIED = {"all_solved", "none_solved", "tied", "rate_low", "hacked", "entropy"}
EXPLAINED: dict[str, set[str]] = {  # the consequences of a cause, which are left out after it
    "rate_high": TIED | {"stop_token", "template", "answer_column", "clipped"},
    "stop_token": TIED | {"template", "answer_column", "clipped"},
    "template": TIED | {"answer_column", "clipped"},
    "group_size": {"tied"},
    **dict.fromkeys(("sign_flipped", "reward_constant"), TIED | {"answer_column"}),
    **dict.fromkeys(("temperature", "answer_column", "all_solved", "none_solved", "tied"), TIED),
}
# What is no cause, by loss.advantage: these estimators learn from a group whose marks are equal, and a teacher's
# log-probabilities are learned from whatever the marks are.
_OF_GROUPS = {"temperature", "group_size", "tied"}
_OF_MARKS = {"unmarked", "sign_flipped", "reward_constant", "template", "answer_column"}
_OF_MARKS |= {"hacked", "other_part", "noise", "all_solved", "none_solved", "tiny_differences"}
NO_CAUSE: dict[str, set[str]] = {
    **dict.fromkeys(("reinforce_plus_plus", "gae", "rank_softmax"), _OF_GROUPS),
    "distill": _OF_GROUPS | _OF_MARKS,
}
