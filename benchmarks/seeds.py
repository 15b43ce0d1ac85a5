"""The interval of a mean over three seeds, for benchmarks that train."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

STUDENT_T = 4.303  # 95 %, two degrees of freedom: three seeds


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of three values; NaN of another number of them.

    >>> round(half_interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    return STUDENT_T * stdev(values) / len(values) ** 0.5 if len(values) == 3 else float("nan")


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Of each seed, as JSON has it: `half_of_its_interval` is null but for three.

    >>> interval([1.0, 2.0])
    {'each': [1.0, 2.0], 'mean': 1.5, 'half_of_its_interval': None}
    """
    half = half_interval(values) if len(values) == 3 else None
    return {"each": list(values), "mean": fmean(values), "half_of_its_interval": half}
