"""Statistics of an evaluation against numbers worked out by hand, brute force, and numpy's bootstrap."""

import math
from decimal import Decimal
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from review.statistics.estimates import (
    Estimate,
    Z,
    answer_reader,
    estimate,
    majority,
    majority_at_k,
    mean_interval,
    pass_at_k,
    powers_of_two,
    student_t,
    wilson_interval,
)


def test_the_interval_of_a_few_seeds_by_hand():
    # mean 2, deviations -1 0 1: variance 1, standard error 1 / sqrt(3); t of two degrees of freedom is 4.303
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert mean_interval([1.0, 2.0]) is None
    # 40 values of 0 and 40 of 1: mean .5, variance 80 · .25 / 79; t of 79 degrees of freedom is 1.990
    half = 1.990 * (20 / 79 / 80) ** 0.5
    assert mean_interval([0.0, 1.0] * 40) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


@pytest.mark.parametrize(
    ("hits", "trials", "expected"),
    [(81, 263, (0.2535, 0.3682)), (15, 148, (0.0598, 0.1644)), (0, 20, (0.0, 0.2005)), (1, 29, (0.0018, 0.1963))],
)
def test_the_interval_is_wilsons_with_continuity_correction(hits, trials, expected):
    """Against the roots of (|p - hits/trials| - 1 / (2 trials))² = z² p (1 - p) / trials, which define it, and the
    examples of Newcombe 1998, table I, method 4."""
    low, high = wilson_interval(hits, trials)
    assert (wilson_interval(0, 5)[0], wilson_interval(5, 5)[1]) == (0.0, 1.0), "rounding passes no bound"
    assert (low, high) == pytest.approx(expected, abs=1e-4)
    for p in filter(None, (low, high)):  # a bound of 0 is no root
        assert (abs(p - hits / trials) - 1 / (2 * trials)) ** 2 == pytest.approx(
            1.96**2 * p * (1 - p) / trials, abs=1e-12
        )


def test_nothing_tried_is_nothing_known_and_where_nothing_succeeded_the_interval_has_a_width():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert estimate([]) == Estimate(0.0, 0.0, 1.0, 0)
    assert estimate([0.0] * 100).high == pytest.approx(0.046, abs=1e-3)
    assert estimate([1.0] * 100).low == pytest.approx(0.954, abs=1e-3)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_one_completion_a_problem_gives_the_plain_wilson_interval(outcomes):
    found = estimate([float(outcome) for outcome in outcomes])
    assert (found.low, found.high) == pytest.approx(wilson_interval(sum(outcomes), len(outcomes)), abs=1e-9)
    assert found.value == sum(outcomes) / len(outcomes)


def test_copies_of_a_completion_do_not_narrow_the_interval():
    """Eight times the same completion of each problem tell no more than one."""
    right = [True, False, False, True, False]
    once = estimate([float(r) for r in right])
    assert estimate([np.mean([r] * 8) for r in right]) == once
    wide, narrow = once.high - once.low, np.subtract(*wilson_interval(16, 40)[::-1])
    assert wide > 2 * narrow  # what counting completions as independent would have claimed


@pytest.mark.parametrize(("problems", "samples"), [(3, 8), (5, 2), (5, 16), (10, 8)])
def test_the_interval_of_few_problems_with_several_samples_holds_the_accuracy(problems, samples):
    """Accuracies of the problems are uniform, so the true one is .5. Before, the spread of few problems was taken for
    known: .78, .87, .87 and .92 in place of .95."""
    random = np.random.default_rng(0)
    found = [estimate(list(random.binomial(samples, random.random(problems)) / samples)) for _ in range(4000)]
    assert np.mean([each.low <= 0.5 <= each.high for each in found]) >= 0.945


def test_the_interval_of_few_problems_by_hand():
    """0, .5, 1, 0, and 0 and 1: p = 2.5 / 6, variance .2417, t of three degrees of freedom 3.182; the product is below
    4."""
    assert 4 * 0.41667 * 0.58333 / 0.24167 * (1.96 / 3.182) ** 2 < 4
    assert estimate([0.0, 0.5, 1.0, 0.0]) == Estimate(0.375, *wilson_interval(1.5, 4), 4)
    # twelve of .5, and 0 and 1: variance .5 / 13, t of eleven degrees 2.201: 12 · .25 / (.5 / 13) · (1.96 / 2.201)²
    narrow = estimate([0.5] * 12)
    assert (narrow.low, narrow.high) == pytest.approx(wilson_interval(61.854 / 2, 61.854), abs=1e-4)


@pytest.mark.parametrize(("degrees", "exact"), [(1, 12.706), (30, 2.0423), (31, 2.0395), (40, 2.0211), (120, 1.9799)])
def test_students_t_goes_on_after_its_table(degrees, exact):
    assert student_t(degrees) == pytest.approx(exact, abs=0.0035)
    assert student_t(0) == math.inf
    for n in range(3, 31):  # the table, by three terms of the expansion
        series = Z + (Z**3 + Z) / (4 * n) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * n**2)
        assert student_t(n) == pytest.approx(series, abs=3.3 / n**3 + 0.001), n


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n):
    for correct in range(n + 1):
        completions = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(completions, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_the_product_form_of_the_paper():
    """Chen et al. 2021, figure 3: 1 - Π_{i = n - c + 1}^{n} (1 - k / i); also for many completions."""
    for n, correct, k in ((100, 7, 16), (256, 1, 64), (1000, 500, 4)):
        product = np.prod(1.0 - k / np.arange(n - correct + 1, n + 1))
        assert pass_at_k(n, correct, k) == pytest.approx(1.0 - product)
    assert pass_at_k(4, 1, 2) == 1 - comb(3, 2) / comb(4, 2) == 0.5


def test_pass_at_k_needs_k_completions():
    with pytest.raises(ValueError, match="pass@4 cannot be estimated from 3 completions"):
        pass_at_k(3, 1, 4)


@pytest.mark.parametrize(("most", "expected"), [(0, []), (1, [1]), (2, [1, 2]), (7, [1, 2, 4]), (8, [1, 2, 4, 8])])
def test_powers_of_two(most, expected):
    assert powers_of_two(most) == expected


@pytest.mark.parametrize(
    ("answers", "winner"),
    [([7, 42, 42], 42), ([7, 42, 42, 7], 7), ([None, None, 5], 5), ([None], None), ([], None), ([0, None, None], 0)],
)
def test_the_majority_and_its_ties(answers, winner):
    assert majority(answers) == winner


def test_a_majority_vote_is_over_disjoint_runs_of_k():
    answers, correct = [7, 7, 42, 42, 42, 7], [False, False, True, True, True, False]
    assert majority_at_k(answers, correct, 1) == 0.5
    assert majority_at_k(answers, correct, 2) == pytest.approx(2 / 3)  # 7, 42, and a tie that 42 opens
    assert majority_at_k(answers, correct, 3) == 0.5
    assert majority_at_k(answers, correct, 4) == 0.0  # one run, and a tie that 7 opens; the last two are left over
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k([7, 7], [True, False], 2) == 1.0  # as correct as the first that gives it


def test_contract_6_a_vote_without_a_mark_is_not_counted_as_wrong():
    assert majority_at_k([7, 7], [None, None], 2) is None
    assert majority_at_k([7, 7], [None, True], 2) == 1.0  # the other completion with this answer says it
    assert majority_at_k([7, 7, 1, 1], [None, None, True, True], 2) == 1.0


@pytest.mark.parametrize(
    ("function", "arguments", "text", "answer"),
    [
        ("gsm8k", {}, "6 * 7 = 42\n#### 42.0", Decimal(42)),
        ("gsm8k", {}, "so 42", None),
        ("gsm8k", {"mode": "flexible"}, "so 42", Decimal(42)),
        ("gsm8k_flexible", {}, "so 42 it is", Decimal(42)),
        ("gsm8k_boxed", {}, r"\boxed{42}", Decimal(42)),
        ("gsm8k_lm_eval", {}, "#### 1,042.\n#### 7", "1042"),
        ("reasoning_gym", {}, "<answer>0</answer><answer>one</answer> or <answer> Two\n three </answer>", "two three"),
        ("mine.py:score", {}, "because #### Yes", "yes"),
        ("mine.py:score", {}, "  Yes ", "yes"),
        ("mine.py:score", {}, r"first we add. \boxed{1} no, \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("math_equivalence", {}, r"then we add: $\boxed{ x + 1 }$.", "x + 1"),
        ("mine.py:score", {}, r"\boxed{1} and #### 2", "2"),
        ("mine.py:score", {}, r"so \boxed{cut", r"so \boxed{cut"),
        ("mine.py:score", {}, " ", None),
    ],
)
def test_the_answer_is_read_as_the_reward_reads_it(function, arguments, text, answer):
    assert answer_reader(function, arguments)(text) == answer
