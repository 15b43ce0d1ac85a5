"""The intervals that the commands state hold as often as the docs report, for the kinds that are hardest."""

import pytest

from benchmarks.coverage import ACCURACIES, DIFFERENCES, NOT_STATED, RUNS, coverage
from review.statistics.estimates import LEAST_COVERAGE

CASES = 400
ERROR = 0.026  # two standard errors of a share of 0.93 in so many cases
KINDS = {kind.name: kind for kind in (*ACCURACIES, *DIFFERENCES, *RUNS)}
HARDEST = (
    ("accuracy 0.99, one sample", 50),
    ("one problem in 20 solvable, eight samples", 20),
    ("one problem in 10 unsolvable, eight samples", 10),
    ("0.01 to 0.03, the page's sentence", 50),
    ("one problem in 20 learned, eight samples", 20),
    ("one problem in 20 forgotten, eight samples", 10),
    ("one run in five fails", 5),
    ("one run in five fails", 10),
    ("log-normal", 20),
)


@pytest.mark.parametrize(("name", "count"), HARDEST)
def test_a_stated_interval_holds(name, count):
    assert coverage(KINDS[name], count, CASES) >= LEAST_COVERAGE - ERROR


@pytest.mark.parametrize("count", [3, 50, 512])
def test_rewards_without_limits_have_no_interval(count):
    for kind in DIFFERENCES:
        if kind.name.startswith("rewards"):
            assert coverage(kind, count, 3) is None


def test_three_seeds_have_no_interval_and_students_would_not_hold():
    assert coverage(KINDS["one run in five fails"], 3, CASES) is None
    assert coverage(NOT_STATED[0], 3, CASES) < 0.6
