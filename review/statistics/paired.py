"""Two policies on the same problems with the same noise: the difference is narrower than the intervals of the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles, variance

from review.statistics.estimates import mean_interval

LOST_AND_WON = 2  # problems that are added on either side
NO_LIMITS = (
    "no interval: rewards have no limits, so a few problems that were not drawn may decide their mean difference"
)


@dataclass(frozen=True)
class PairedDifference:
    """The mean over problems of second − first, with its 95 % interval, or `why_no_interval`.

    `unpaired`: how many times as many problems would give this interval if each policy had problems and noise of its
    own, (Var a + Var b) / Var(b − a); None without an interval, and if the differences do not vary. `higher` and
    `lower` count the problems that the second policy answers better and worse. `points` are the lowest difference, the
    quartiles and the highest.
    """

    value: float
    low: float | None
    high: float | None
    problems: int
    unpaired: float | None
    higher: int = 0
    lower: int = 0
    points: tuple[float, ...] = ()
    why_no_interval: str | None = None


def paired_difference(
    first_N: Sequence[float], second_N: Sequence[float], most: float | None = 1.0
) -> PairedDifference:
    """The interval spans three: Student's t over the problems, the same with two more that are lost and two that are
    won, and the same with one more that is lost and one that is won by `most`.

    The first by itself has no width for three of three, and is too narrow for few problems that mostly tie. The second
    does for problems what two more successes and failures do for a share (Agresti and Coull 1998). An added problem
    differs as much as the others that differ do, in the root mean square. The third is for several samples of each
    problem: they differ by little on most problems, and rarely by much. `benchmarks/coverage.py` has the coverage: 0.93
    or more.

    No difference exceeds `most`, 1 of accuracies. With None, for rewards, which have no limits, there is no interval:
    whatever is computed from the problems drawn, rare ones may move the mean. Raises ValueError for no problems.

    >>> pair = paired_difference([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])    # Var a = 1/3, Var b = 1/4, Var d = 1/4
    >>> round(pair.value, 2), round(pair.low, 3), pair.high, round(pair.unpaired, 2), pair.higher, pair.lower
    (0.25, -0.623, 1.0, 2.33, 1, 0)
    """
    differences = [b - a for a, b in zip(first_N, second_N, strict=True)]
    if not differences:
        raise ValueError("the two evaluations have no problem in common that both have a mark for")
    count, mean = len(differences), fmean(differences)
    higher, lower = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    points = _points(differences)
    if most is None:
        return PairedDifference(mean, None, None, count, None, higher, lower, points, NO_LIMITS)
    low, high = _interval(differences, most)
    spread = variance(differences) if count > 1 else 0.0
    unpaired = (variance(first_N) + variance(second_N)) / spread if spread > 1e-12 else None
    return PairedDifference(mean, max(low, -most), min(high, most), count, unpaired, higher, lower, points)


def _interval(differences: Sequence[float], most: float) -> tuple[float, float]:
    squares = [difference**2 for difference in differences if difference]
    usual = math.sqrt(fmean(squares)) if squares else most
    likely = [*differences, *[-usual, usual] * LOST_AND_WON]
    rare = [*differences, -most, most]
    intervals = list(filter(None, map(mean_interval, (differences, likely, rare))))
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _points(differences: list[float]) -> tuple[float, ...]:
    quartiles = quantiles(differences, n=4, method="inclusive") if len(differences) > 1 else differences * 3
    return (min(differences), *quartiles, max(differences))
