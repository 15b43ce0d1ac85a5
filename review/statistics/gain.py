"""What a run has gained, by its records: the training reward, and the held-out problems before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from review.statistics.estimates import difference_interval, median_interval, student_t
from review.statistics.paired import paired_difference
from rewards.verdicts import ACCURACY, held_out_metric, judged_problems

MEAN = "reward/mean"


@dataclass(frozen=True)
class Gain:
    """The change from `first` to `last`, with its 95 % interval. `of` says what it is a mean over."""

    first: float
    last: float
    low: float
    high: float
    of: str
    count: int
    metric: str = ""
    is_paired: bool = False
    interval: str = "95 % interval"

    @property
    def value(self) -> float:
        return self.last - self.first

    @property
    def words(self) -> str:
        """The numbers as a sentence goes on with them.

        >>> Gain(0.5, 0.55, -0.14, 0.24, "50 problems", 50).words
        'from 0.500 to 0.550: +0.050 (95 % interval -0.140 to +0.240; 50 problems)'
        """
        interval = f"{self.interval} {self.low:+.3f} to {self.high:+.3f}; {self.of}"
        return f"from {self.first:.3f} to {self.last:.3f}: {self.value:+.3f} ({interval})"


def training_gain(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Gain | None:
    """The mean of the first of these metrics that was recorded, in the last third of the steps less that in the first;
    None for fewer than six steps.

    Student's t with the degrees of freedom of one third: no interval of two means with unequal variances needs more.
    """
    each = ([row[name] for row in rows if row.get(name) is not None] for name in metrics)
    values: list[float] = next(filter(None, each), [])
    third = len(values) // 3
    if third < 2:
        return None
    first, last = values[:third], values[-third:]
    error = math.sqrt((variance(first) + variance(last)) / third)
    difference, half = fmean(last) - fmean(first), student_t(third - 1) * error
    of = f"{third} steps at either end"
    return Gain(fmean(first), fmean(last), difference - half, difference + half, of, third)


def held_out_gain(
    rows: Sequence[Mapping[str, Any]], by_problem: Mapping[int, Mapping[str, float | None]]
) -> Gain | None:
    """The last evaluation less the first; None without two, and where no interval is known.

    `rows` are those of `read_metrics`, `by_problem` of `read_problems`. Where both evaluations have their problems, the
    interval is that of `paired_difference`. Otherwise it is Newcombe's, of two Wilson intervals over as many problems
    (Newcombe 1998, method 11), which is too wide for evaluations that share problems and noise. Rewards have no limits,
    so theirs is that of the median difference, over the problems that differ.
    """
    metric = held_out_metric(rows)
    evaluated = [row for row in rows if row.get(metric) is not None]
    if len(evaluated) < 2:
        return None
    before, after = evaluated[0], evaluated[-1]
    if gain := _paired(by_problem.get(before["step"], {}), by_problem.get(after["step"], {}), metric):
        return gain
    problems = min(judged_problems(before), judged_problems(after))
    if metric != ACCURACY or not problems:
        return None
    first, last = before[metric], after[metric]
    low, high = difference_interval(first, last, (problems, problems))
    return Gain(first, last, low, high, f"{problems:.0f} problems", int(problems), metric)


def _paired(before: Mapping[str, float | None], after: Mapping[str, float | None], metric: str) -> Gain | None:
    both = [name for name in before if before[name] is not None and after.get(name) is not None]
    if not both:
        return None
    first = [before[name] or 0.0 for name in both]
    last = [after[name] or 0.0 for name in both]
    if metric != ACCURACY:
        return _paired_rewards(first, last, metric)
    pair = paired_difference(first, last)
    if pair.low is None or pair.high is None:
        return None
    of = f"the same {len(both)} problems"
    return Gain(fmean(first), fmean(last), pair.low, pair.high, of, len(both), metric, is_paired=True)


def _paired_rewards(first: Sequence[float], last: Sequence[float], metric: str) -> Gain | None:
    """Above or below 0 as the sign test is: the median of the differences that are not 0."""
    differing = [after - before for before, after in zip(first, last, strict=True) if after != before]
    interval = median_interval(differing)
    if interval is None:
        return None
    of = f"the {len(differing)} of {len(first)} problems that differ"
    words = "interval of the median difference"
    return Gain(fmean(first), fmean(last), *interval, of, len(differing), metric, is_paired=True, interval=words)
