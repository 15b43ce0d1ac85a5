"""Rewards that are no judgement: failures as numbers, NaN, rewards without parts, sums that are none, ties."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from rewards.audit.findings import Rollouts
from rewards.audit.traces import FAILED, Trace
from rewards.finding import Finding, found
from rewards.ties import tied

EXCEPTION = re.compile(
    r"\W*(?:Traceback \(most recent|[\w.]*[A-Z]\w*(?:Error|Exception|Timeout)\b *(?:[:(]|\Z)|[^.]*timed out)"
)
ALWAYS = ("verl", "nemo_gym", "verifiers_results")  # forms in which every rollout has a reward
DECLARED = ("trl", "quartet", "verifiers", "verifiers_results", "common")  # and those whose parts are rewards' values
MOST_TIED = 0.9
FAR = 5.0  # spreads below the others
FAR_ABOVE = 1000.0  # a sparse reward has rare values that are far above the usual ones
USUAL = 1.0  # no reward between -1 and 1 stands for something else
OF_THE_PROBLEM = re.compile("answer|expected|truth|gold|target|label|solution|reference|gts", re.IGNORECASE)
PENALTY = re.compile("penal|cost|length|long|repe|duplic|trunc|violat|toxic|harm", re.IGNORECASE)
NEAR = 1e-4  # of a sum


def failures(rollouts: Rollouts) -> Iterator[Finding]:
    """A rollout that failed was not judged: a number for it teaches that the text was wrong."""
    rows = [trace for trace in rollouts.traces if trace.scored and _failure(trace)]
    if rows:
        marks = sorted({trace.value for trace in rows})
        number = f"all {marks[0]:g}" if len(marks) == 1 else f"{marks[0]:g} to {marks[-1]:g}"
        what = f"{len(rows)} rollouts failed and have a reward as if they had been judged ({number})"
        yield found("failure-as-number", f"{what}; the first failure: {_failure(rows[0]):.120}", rows)


def _failure(trace: Trace) -> str | None:
    if trace.error or trace.finish_reason in FAILED:
        return trace.error or trace.finish_reason
    texts = [
        value for name, value in trace.columns.items() if isinstance(value, str) and not OF_THE_PROBLEM.search(name)
    ]
    failed = [text for text in texts if EXCEPTION.match(text[:200])]  # code may hold the name of one
    return next((text for text in failed if text not in trace.prompt and text not in trace.completion), None)


def not_numbers(rollouts: Rollouts) -> Iterator[Finding]:
    wrong = []
    has_advantages = sum(trace.advantage is not None for trace in rollouts.trained) > len(rollouts.trained) / 2
    for trace in rollouts.traces:
        marks = [trace.reward, trace.advantage, *trace.parts.values()]
        abstains = trace.form == "trl"  # a table has NaN where a reward function returned None
        bad = any(mark is not None and not math.isfinite(mark) and not (abstains and mark != mark) for mark in marks)
        bad = bad or (trace.advantage is not None and math.isnan(trace.advantage))
        bad = bad or (trace.advantage is None and trace.split == "train" and has_advantages)
        if bad or trace.unread or (trace.reward is None and trace.form in ALWAYS):
            wrong.append(trace)
    if wrong:
        groups = sum(set(wrong).issuperset(group) for group in rollouts.groups)
        first = next(iter(wrong[0].unread.values()), wrong[0].reward)
        what = f"{len(wrong)} rollouts have NaN, null or text as reward or advantage (the first: {first!r:.80})"
        yield found("not-a-number", what + (f"; {groups} whole groups" if groups else ""), wrong)


def unscored(rollouts: Rollouts) -> Iterator[Finding]:
    rows = [trace for trace in rollouts.trained if not trace.scored and abs(trace.credit) > 1e-6]
    yield found("unscored-counts", f"{len(rows)} rollouts have no reward, but an advantage that is not 0", rows)


def outliers(rollouts: Rollouts) -> Iterator[Finding]:
    """A value far below all others is often a mark for something else, such as -100 for `no answer`."""
    rewards = sorted(trace.value for trace in rollouts.trained if trace.scored)
    if len(rewards) < 20:
        return
    low, high = rewards[len(rewards) // 20], rewards[-1 - len(rewards) // 20]
    spread = high - low
    least, most = min(low - FAR * spread, -USUAL), max(high + FAR_ABOVE * spread, USUAL)
    rest = [value for value in rewards if value > rewards[0]]
    if len(rest) > len(rewards) / 2 and rest[0] - rewards[0] > FAR * (rest[-1] - rest[0]) and rewards[0] < -USUAL:
        least, low = rest[0], rest[0]  # one value for many failures
    far = [t for t in rollouts.trained if t.scored and not least <= t.value <= most]
    if far and spread:
        what = f"{len(far)} rewards lie far outside of the others, which are {low:g} to {high:g}"
        yield found("outlier", f"{what}: {far[0].reward:g}", far)


def ties(rollouts: Rollouts) -> Iterator[Finding]:
    groups = [[trace.value for trace in group if trace.scored] for group in rollouts.groups]
    are_tied = [tied(rewards) for rewards in groups if len(rewards) > 1]
    count, early = sum(are_tied), are_tied[: len(are_tied) // 3]
    if are_tied:
        rollouts.figures["tied groups"] = f"{count} of {len(are_tied)}"
    learned = sum(early) < MOST_TIED * len(early)  # a policy that can do everything at the end has nothing to learn
    if len(are_tied) >= 8 and count >= MOST_TIED * len(are_tied) and not learned:
        yield found("tied-groups", f"{count} of {len(are_tied)} groups are tied and teach nothing", rollouts.groups[0])
    for name in sorted({name for trace in rollouts.trained for name in trace.parts if trace.form in DECLARED[:3]}):
        rows = [trace for trace in rollouts.trained if trace.parts.get(name) is not None]
        if len(rows) >= 64 and not PENALTY.search(name) and not any(trace.parts[name] for trace in rows):
            yield found("always-zero", f"the reward {name} is 0 for all {len(rows)} rollouts", rows[:3])


def sums(rollouts: Rollouts) -> Iterator[Finding]:
    """The reward is the weighted sum of its parts: with the weights that were recorded, with 1, or with those that
    explain most rollouts. Other numbers than parts of it may stand beside a reward, so that those are only looked at
    for weights that change."""
    rows = [trace for trace in rollouts.traces if trace.form != "trl" and trace.scored and _parts(trace)]
    if not rows:
        return
    names = sorted({name for trace in rows for name in _parts(trace)})
    weighted = all(trace.weights for trace in rows)
    if not weighted and names and (rest := _changed(rows, names) or _changed(rows[::-1], names)):
        place = f"from {rest[0].place} on"
        yield found("weights-changed", f"the weights of the parts change {place}", rest)
        return
    choices = [dict.fromkeys(names, 1.0)]
    if not weighted and len(rows) >= 3 * len(names) + 8:
        choices.append(_fit(rows, names))
    off = min(([t for t in rows if not _explains(t.weights or weights, t)] for weights in choices), key=len)
    if off and rows[0].parts and (weighted or len(off) <= len(rows) / 5):
        first = off[0]
        parts = ", ".join(f"{name} {value:g}" for name, value in _parts(first).items())
        what = f"{len(off)} rewards are not the weighted sum of their parts"
        yield found("sum-of-parts", f"{what}: {first.reward:g} of {parts}", off)


def _parts(trace: Trace) -> dict[str, float]:
    """The parts, all numbers; of forms without parts the numbers beside the reward. Empty where one is missing."""
    columns = {name: value for name, value in trace.columns.items() if isinstance(value, float)}
    parts = trace.parts if trace.form not in ("verl", "nemo_gym") else columns
    numbers = {name: value for name, value in parts.items() if value is not None and math.isfinite(value)}
    return numbers if len(numbers) == len(parts) else {}


def _changed(rows: Sequence[Trace], names: Sequence[str]) -> list[Trace]:
    """The rollouts that other weights explain than those of the first quarter, which explain all up to them."""
    if len(rows) < 4 * (3 * len(names) + 8):
        return []
    first = _fit(rows[: len(rows) // 4], names)
    start = next((index for index, trace in enumerate(rows) if not _explains(first, trace)), len(rows))
    before, after = rows[:start], rows[start:]
    if len(after) < 3 * len(names) + 8 or len(before) < len(rows) // 4:
        return []
    second = _fit(after, names)
    agree = sum(_explains(second, trace) for trace in after) >= 0.98 * len(after)
    differ = sum(_explains(second, trace) for trace in before) <= 0.9 * len(before)
    return [trace for trace in after if not _explains(first, trace)] if agree and differ else []


def _explains(weights: dict[str, float], trace: Trace) -> bool:
    total = sum(weights.get(name, 0.0) * value for name, value in _parts(trace).items())
    return abs(total - trace.value) <= NEAR * max(1.0, abs(total))


def means(rollouts: Rollouts) -> Iterator[Finding]:
    """A mean that was recorded beside the rollouts is that of their rewards."""
    rewards = [trace.value for trace in rollouts.traces[: rollouts.own] if trace.scored]
    for file, recorded in rollouts.means.items():
        mean = math.fsum(rewards) / max(len(rewards), 1)
        if abs(mean - recorded) > 0.002 * max(1.0, abs(mean)):
            what = f"{file} has the mean reward {recorded:.4f}, and that of the {len(rewards)} rollouts is {mean:.4f}"
            yield found(
                "mean-differs", f"{what}: it is divided by another number, or is of other rollouts", rollouts.traces
            )


def _fit(rows: Sequence[Trace], names: Sequence[str]) -> dict[str, float]:
    """Least squares, again without the fifth of the rollouts that it explains worst."""
    pairs = [(dict.fromkeys(names, 0.0) | _parts(trace), trace.value) for trace in rows]
    part = pairs
    for _ in range(4):
        matrix = [[sum(parts[a] * parts[b] for parts, _ in part) for b in names] for a in names]
        vector = [sum(parts[name] * reward for parts, reward in part) for name in names]
        weights = dict(zip(names, _solve(matrix, vector), strict=True))
        errors = [abs(sum(weights[name] * parts[name] for name in names) - reward) for parts, reward in pairs]
        limit = max(sorted(errors)[len(errors) * 4 // 5], NEAR)
        part = [pair for pair, error in zip(pairs, errors, strict=True) if error <= limit]
    return weights


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Gauss-Jordan, with a little on the diagonal for parts that go together."""
    size = len(vector)
    table = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i in range(size):
        table[i][i] += 1e-9 * (1.0 + table[i][i])
        for j in range(size):
            factor = table[j][i] / table[i][i] if j != i else 0.0
            table[j] = [a - factor * b for a, b in zip(table[j], table[i], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(table)]
