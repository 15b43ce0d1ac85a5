"""Two policies on the same problems with the same noise: the difference is narrower than the intervals of the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from grpo.algorithm.statistics import Z
from grpo.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class PairedDifference:
    """The mean over problems of second − first, with its 95 % interval.

    `unpaired`: how many times as many problems would give this interval if each policy had problems and noise of its
    own, (Var a + Var b) / Var(b − a); None where the differences do not vary.
    """

    value: float
    low: float
    high: float
    problems: int
    unpaired: float | None


def paired_difference(first_N: Sequence[float], second_N: Sequence[float]) -> PairedDifference:
    """The interval is the normal one over problems, d ± 1.96 √(Var(d) / N). Raises ValueError for no problems.

    >>> paired_difference([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])     # Var a = 1/3, Var b = 1/4, Var d = 1/4
    PairedDifference(value=0.25, low=-0.24, high=0.74, problems=4, unpaired=2.333...)
    """
    differences = [b - a for a, b in zip(first_N, second_N, strict=True)]
    if not differences:
        raise ValueError("the two evaluations have no problem in common that both have a mark for")
    count, mean = len(differences), fmean(differences)
    if count == 1:
        return PairedDifference(mean, -math.inf, math.inf, 1, None)
    spread = variance(differences)
    half = Z * math.sqrt(spread / count)
    unpaired = (variance(first_N) + variance(second_N)) / spread if spread > 1e-12 else None
    return PairedDifference(mean, mean - half, mean + half, count, unpaired)


def compare(first: Evaluation, second: Evaluation) -> PairedDifference:
    """Over the problems that both have a mark for, by `prompt_id`: by the share that is right where both have an
    accuracy, else by the mean reward."""
    judged = first.interval is not None and second.interval is not None

    def by_id(evaluation: Evaluation) -> dict[str, float]:
        values = evaluation.by_problem if judged else evaluation.rewards_by_problem
        ids = [group.prompt.prompt_id for group in evaluation.groups]
        return {name: value for name, value in zip(ids, values, strict=True) if value is not None}

    a, b = by_id(first), by_id(second)
    both = [name for name in a if name in b]
    return paired_difference([a[name] for name in both], [b[name] for name in both])
