"""The statistics of an evaluation: intervals, pass@k, majority votes. Pure functions.

Axes: N problems, n completions of one problem.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

Z = 1.96  # of a 95 % interval
# The same of Student's t, by degrees of freedom up to 30.
T = (
    *(math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145),
    *(2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
LEAST_COVERAGE = 0.93  # of a stated interval, for every kind of values in benchmarks/coverage.py
INTERVAL_METHOD = (
    "Wilson's score interval over problems with continuity correction, with the effective number of problems "
    "p(1 - p) / Var, corrected for few problems as by Korn and Graubard; Var includes a problem of 0 and one of 1"
)

_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float
    problems: int


def wilson_interval(hits: float, trials: float, z: float = Z) -> tuple[float, float]:
    """95 % confidence interval of a proportion: Wilson's with continuity correction (Newcombe 1998, method 4).

    Without the correction it holds a proportion near 0 or 1 in as few as 0.83 of all cases. `hits` may be a fraction.
    Less than one hit, or one miss, leaves that side open: no proportion is too close to 0, or to 1.

    >>> [round(bound, 3) for bound in wilson_interval(1, 10)]
    [0.005, 0.459]
    """
    if trials == 0:
        return 0.0, 1.0
    low = 0.0 if hits < 1 else _wilson_bound(hits, trials, z)
    high = 1.0 if hits > trials - 1 else 1.0 - _wilson_bound(trials - hits, trials, z)
    return low, high


def _wilson_bound(hits: float, trials: float, z: float) -> float:
    """The lower bound of a proportion; the upper one is that of the misses."""
    p = hits / trials
    root = z * z - 2 - 1 / trials + 4 * p * (trials * (1 - p) + 1)
    return max(0.0, (2 * hits + z * z - 1 - z * math.sqrt(max(0.0, root))) / (2 * (trials + z * z)))


def difference_interval(first: float, second: float, counts: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval of second − first, two shares of so many problems each, from their Wilson intervals.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 11. Two evaluations
    of the same problems differ by less than independent ones, so that for them it is wider than need be.

    >>> [round(bound, 3) for bound in difference_interval(0.2, 0.5, (10, 10))]    # of (0.035, 0.558) and (0.201, 0.799)
    [-0.166, 0.641]
    """
    low_1, high_1 = wilson_interval(first * counts[0], counts[0])
    low_2, high_2 = wilson_interval(second * counts[1], counts[1])
    difference = second - first
    below, above = math.hypot(second - low_2, high_1 - first), math.hypot(high_2 - second, first - low_1)
    return difference - below, difference + above


def estimate(values_N: Sequence[float]) -> Estimate:
    """Mean of one number in [0, 1] per problem, with the Wilson interval of its effective sample size.

    The completions of one problem resemble each other, so problems are what is counted: n_eff = p(1 − p) / Var(mean)
    (Franco et al. 2019, "Comparative study of confidence intervals for proportions in complex sample surveys"). For
    values of 0 and 1 it is N itself, and this is the plain Wilson interval; a normal interval over problems differs
    from it where the mean is near 0 or 1, and would have no width at 0. Other values vary less, and by how much is
    estimated from few problems: n_eff is multiplied by (1.96 / t)² of N − 1 degrees of freedom (Korn and Graubard 1998)
    and never falls below N. Both p and Var here include one more problem of 0 and one of 1, for the rare problems that
    few draws miss: without them, 20 problems of which one in twenty is solvable hold the accuracy in 0.60 of all cases.

    >>> estimate([0.0, 0.5, 1.0, 0.0])
    Estimate(value=0.375, low=0.045..., high=0.849..., problems=4)
    """
    if not values_N:
        return Estimate(0.0, 0.0, 1.0, 0)
    problems = len(values_N)
    extended = [*values_N, 0.0, 1.0]
    p = fmean(extended)
    single = p * (1 - p) / variance(extended, p)  # effective problems for each one
    effective = problems * max(1.0, single * (Z / student_t(problems - 1)) ** 2)
    mean = fmean(values_N)
    return Estimate(mean, *wilson_interval(mean * effective, effective), problems)


def student_t(degrees: int) -> float:
    """The factor of a 95 % interval for a spread that is estimated with so many degrees of freedom; infinite for none.

    After the table it is the first term of the expansion in 1 / degrees, right to .003.

    >>> student_t(2), student_t(60)
    (4.303, 1.9995...)
    """
    return T[degrees] if degrees < len(T) else Z + (Z**3 + Z) / (4 * degrees)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of a few independent values, by Student's t with n - 1 degrees of freedom; None for
    fewer than three: one value has no spread, and of two the interval is 12.7 standard errors wide on either side.

    >>> mean_interval([1.0, 2.0, 3.0])      # 2 ± 4.303 · 1 / √3
    (-0.484..., 4.484...)
    """
    if len(values) < 3:
        return None
    degrees, mean = len(values) - 1, fmean(values)
    half = student_t(degrees) * math.sqrt(variance(values) / len(values))
    return mean - half, mean + half


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the median of independent values in LEAST_COVERAGE of all cases or more, whatever their
    distribution; None for fewer than five, whose lowest and highest value hold it less often.

    The k-th lowest and the k-th highest of n values miss it if fewer than k values lie on one side of it: with
    probability 2 · Σ C(n, i) / 2ⁿ over i < k. Runs need this: if one in five fails, Student's interval of the mean
    over three seeds holds it in 0.49 of all cases.

    >>> median_interval([0.7, 0.1, 0.8, 0.7, 0.9]), median_interval([0.7, 0.8, 0.9])
    ((0.1, 0.9), None)
    """
    ordered, n = sorted(values), len(values)
    inner = 0  # values that may be left out at either end
    ways = below = 1  # C(n, inner), and its sum so far; anew for each, it takes minutes for thousands of values
    while 2 * below / 2**n <= 1 - LEAST_COVERAGE:
        ways = ways * (n - inner) // (inner + 1)
        inner += 1
        below += ways
    return (ordered[inner - 1], ordered[n - inner]) if inner else None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n completions, that one of k is correct: 1 − C(n − c, k) / C(n, k).

    Chen et al. 2021, "Evaluating large language models trained on code", eq. 1.

    Raises ValueError unless k ≤ n.

    >>> pass_at_k(4, 1, 2)      # of the 6 pairs, 3 hold the right one
    0.5
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} completions")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The answer that most completions give; of equals, the one given first. None is no vote.

    >>> majority([None, 7, 42, 42, 7, 5])
    7
    """
    votes = Counter(answer for answer in answers if answer is not None)  # most_common keeps the order of equals
    return votes.most_common(1)[0][0] if votes else None


def majority_at_k(answers_n: Sequence[Hashable | None], correct_n: Sequence[bool | None], k: int) -> float | None:
    """Share of majority votes among k completions that are correct, over the n // k disjoint runs of k in order.

    A vote without answers is wrong; an answer is as correct as the first completion that gives it and has a mark.
    None where the vote is neither right nor wrong: no completion that gives the winning answer has a mark.

    >>> majority_at_k([7, 7, 42, 42, 42, 7], [False, False, True, True, True, False], 3)    # 7 wins, then 42
    0.5
    """
    verdict: dict[Hashable | None, bool] = {None: False}
    for answer, correct in zip(answers_n, correct_n, strict=True):
        if answer is not None and correct is not None:
            verdict.setdefault(answer, correct)
    winners = [majority(answers_n[i : i + k]) for i in range(0, len(answers_n) - k + 1, k)]
    outcomes = [verdict[winner] for winner in winners if winner in verdict]
    return fmean(outcomes) if outcomes else None


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 … up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())]


def answer_reader(function: str, arguments: dict[str, Any]) -> Callable[[str], Hashable | None]:
    r"""Tells how the final answer of a completion is read for the vote, after the reward function that marks it.

    gsm8k's rewards read a number as they do for the mark. For others, an answer is the content of the last
    `<answer>` tags, else what follows the last `####`, else what is in the last `\boxed{}`, else the whole completion;
    blanks and case do not count.

    >>> answer_reader("gsm8k", {})("6 * 7 = 42\n#### 42.0"), answer_reader("mine.py:score", {})("so #### Yes")
    (Decimal('42.0'), 'yes')
    """
    from rewards.built_in.gsm8k import extract_answer, last_boxed, lm_eval_answer

    modes = {"gsm8k": arguments.get("mode", "strict"), "gsm8k_flexible": "flexible", "gsm8k_boxed": "boxed"}
    if function == "gsm8k_lm_eval":
        return lm_eval_answer
    if mode := modes.get(function):
        return lambda text: extract_answer(text, mode)

    def read(text: str) -> str | None:
        _, mark, answer = text.rpartition("####")
        if tagged := _ANSWER_TAG.findall(text):
            answer = tagged[-1]
        elif not mark:
            answer = last_boxed(text) or text
        return " ".join(answer.casefold().split()) or None

    return read
