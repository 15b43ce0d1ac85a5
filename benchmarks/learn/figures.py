"""What the curves of a bench say: how much a contender needs to reach an accuracy, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

# Student's t at 97.5 %, by seeds.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def rising(values: Sequence[float]) -> list[float]:
    """The curve that never falls and is nearest to these values by squares (pool adjacent violators, Ayer et al. 1955).

    A lucky evaluation does not count as reached: the maximum so far would take it for one.

    >>> rising([0.5, 0.75, 0.25, 1.0])
    [0.5, 0.5, 0.5, 1.0]
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (last, count), (before, others) = blocks.pop(), blocks.pop()
            blocks.append(((last * count + before * others) / (count + others), count + others))
    return [value for value, count in blocks for _ in range(count)]


def needed(spent: Sequence[float], accuracy: Sequence[float], target: float) -> float | None:
    """What was spent when the rising curve reaches the target, on a straight line between evaluations; None: never.

    >>> needed([0, 100, 200], [0.25, 0.5, 1.0], 0.75)
    150.0
    """
    curve = rising(accuracy)
    if curve[0] >= target:
        return float(spent[0])
    for i in range(1, len(curve)):
        if curve[i] >= target:
            share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
            return spent[i - 1] + share * (spent[i] - spent[i - 1])
    return None


def at(spent: Sequence[float], accuracy: Sequence[float], budget: float) -> float:
    """The rising curve where so much was spent; its last value where it ended before.

    >>> at([0, 100, 200], [0.25, 0.5, 1.0], 150)
    0.75
    """
    curve = rising(accuracy)
    for i in range(1, len(curve)):
        if spent[i] >= budget:
            share = (budget - spent[i - 1]) / (spent[i] - spent[i - 1])
            return curve[i - 1] + share * (curve[i] - curve[i - 1])
    return curve[-1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and half of its 95 % interval, by Student's t.

    >>> interval([1.0, 2.0, 3.0])               # 2 ± 4.303 / √3
    (2.0, 2.4843...)
    """
    count = len(values)
    return fmean(values), T_975[count] * stdev(values) / sqrt(count)
