"""Rewards that are no judgement: failures as numbers, NaN, rewards without parts, sums that are none, ties."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from rewards.audit.findings import Finding, Rollouts, is_number
from rewards.audit.traces import FAILED, Trace

EXCEPTION = re.compile(r"Traceback \(most recent call last\)|\b[A-Z]\w*(?:Error|Exception|Timeout)\b *[:(]|timed out")
ALWAYS = ("verl", "nemo_gym", "verifiers_results")  # forms in which every rollout has a reward
DECLARED = ("trl", "quartet", "verifiers", "verifiers_results", "common")  # and those whose parts are rewards' values
MOST_TIED = 0.9
FAR = 5.0


def failures(rollouts: Rollouts) -> Iterator[Finding]:
    """A rollout that failed was not judged: a number for it teaches that the text was wrong."""
    failed = [trace for trace in rollouts.traces if is_number(trace.reward) and _failure(trace)]
    if failed:
        marks = sorted({trace.reward for trace in failed if trace.reward is not None})
        number = f"all {marks[0]:g}" if len(marks) == 1 else f"{marks[0]:g} to {marks[-1]:g}"
        what = f"{len(failed)} rollouts failed and have a reward as if they had been judged ({number})"
        yield Finding("failure-as-number", f"{what}; the first failure: {_failure(failed[0]):.120}", failed)


def _failure(trace: Trace) -> str | None:
    if trace.error or trace.finish_reason in FAILED:
        return trace.error or trace.finish_reason
    texts = [value for name, value in trace.columns.items() if isinstance(value, str) and value not in trace.prompt]
    return next((text for text in texts if EXCEPTION.search(text[:2000])), None)


def not_numbers(rollouts: Rollouts) -> Iterator[Finding]:
    wrong = []
    for trace in rollouts.traces:
        marks = [trace.reward, trace.advantage, *trace.parts.values()]
        abstains = trace.form == "trl"  # a table has NaN where a reward function returned None
        bad = any(mark is not None and not math.isfinite(mark) and not (abstains and mark != mark) for mark in marks)
        bad = bad or (trace.advantage is not None and math.isnan(trace.advantage))
        if bad or trace.unread or (trace.reward is None and trace.form in ALWAYS):
            wrong.append(trace)
    if wrong:
        marked = set(map(id, wrong))
        groups = sum(marked.issuperset(map(id, group)) for group in rollouts.groups)
        first = next(iter(wrong[0].unread.values()), wrong[0].reward)
        what = f"{len(wrong)} rollouts have no number as reward or advantage (the first: {first!r:.80})"
        yield Finding("not-a-number", what + (f"; {groups} whole groups" if groups else ""), wrong)


def unscored(rollouts: Rollouts) -> Iterator[Finding]:
    rows = [trace for trace in rollouts.trained if not is_number(trace.reward) and abs(trace.advantage or 0.0) > 1e-6]
    if rows:
        yield Finding("unscored-counts", f"{len(rows)} rollouts have no reward, but an advantage that is not 0", rows)


def outliers(rollouts: Rollouts) -> Iterator[Finding]:
    """A value far outside of all others is often a mark for something else, such as -100 for `no answer`."""
    rewards = sorted(trace.reward for trace in rollouts.trained if trace.reward is not None and is_number(trace.reward))
    if len(rewards) < 20:
        return
    low, high = rewards[len(rewards) // 20], rewards[-1 - len(rewards) // 20]
    reach = FAR * (high - low)
    far = [t for t in rollouts.trained if is_number(t.reward) and not low - reach <= (t.reward or 0.0) <= high + reach]
    if far and reach:
        what = f"{len(far)} rewards lie far outside of the others, which are {low:g} to {high:g}"
        yield Finding("outlier", f"{what}: {far[0].reward:g}", far)


def ties(rollouts: Rollouts) -> Iterator[Finding]:
    judged = [[t.reward for t in group if t.reward is not None and is_number(t.reward)] for group in rollouts.groups]
    judged = [rewards for rewards in judged if len(rewards) > 1]
    tied = sum(max(rewards) - min(rewards) <= 1e-6 * max(1.0, abs(rewards[0])) for rewards in judged)
    if judged:
        rollouts.figures["tied groups"] = f"{tied} of {len(judged)}"
    if len(judged) >= 8 and tied >= MOST_TIED * len(judged):
        yield Finding("tied-groups", f"{tied} of {len(judged)} groups are tied and teach nothing", rollouts.groups[0])
    for name in sorted({name for trace in rollouts.trained for name in trace.parts if trace.form in DECLARED[:3]}):
        rows = [trace for trace in rollouts.trained if trace.parts.get(name) is not None]
        if len(rows) >= 64 and not any(trace.parts[name] for trace in rows):
            yield Finding("always-zero", f"the reward {name} is 0 for all {len(rows)} rollouts", rows[:3])


def sums(rollouts: Rollouts) -> Iterator[Finding]:
    """The reward is the weighted sum of its parts: with the weights that were recorded, with 1, or with those that
    explain most rollouts."""
    rows = [trace for trace in rollouts.traces if trace.form in DECLARED[1:] and is_number(trace.reward)]
    rows = [trace for trace in rows if trace.parts and all(map(is_number, trace.parts.values()))]
    if not rows:
        return
    names = sorted({name for trace in rows for name in trace.parts})
    known = all(trace.weights for trace in rows)
    weights = dict.fromkeys(names, 1.0)
    off = [trace for trace in rows if not _explains(trace.weights if known else weights, trace)]
    if not known and len(off) > len(rows) / 5 and len(rows) >= 3 * len(names) + 8:
        weights = _fit(rows, names)
        off = [trace for trace in rows if not _explains(weights, trace)]
    if off and (known or len(off) <= len(rows) / 5):
        first = off[0]
        parts = ", ".join(f"{name} {value:g}" for name, value in first.parts.items())
        what = f"{len(off)} rewards are not the weighted sum of their parts"
        yield Finding("sum-of-parts", f"{what}: {first.reward:g} of {parts}", off)


def _explains(weights: dict[str, float], trace: Trace) -> bool:
    total = sum(weights.get(name, 1.0) * (value or 0.0) for name, value in trace.parts.items())
    return abs(total - (trace.reward or 0.0)) <= 1e-4 * max(1.0, abs(total))


def _fit(rows: Sequence[Trace], names: Sequence[str]) -> dict[str, float]:
    """Least squares, again without the fifth of the rollouts that it explains worst."""
    chosen = list(rows)
    for _ in range(4):
        matrix = [
            [sum((t.parts.get(a) or 0.0) * (t.parts.get(b) or 0.0) for t in chosen) for b in names] for a in names
        ]
        vector = [sum((t.parts.get(a) or 0.0) * (t.reward or 0.0) for t in chosen) for a in names]
        weights = dict(zip(names, _solve(matrix, vector), strict=True))
        error = {id(t): abs(sum(weights[n] * (v or 0.0) for n, v in t.parts.items()) - (t.reward or 0.0)) for t in rows}
        chosen = sorted(rows, key=lambda trace: error[id(trace)])[: max(len(rows) * 4 // 5, 1)]
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
