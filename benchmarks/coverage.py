"""How often the intervals of `quartet eval`, `quartet compare` and the page of a run hold the true value.

    python benchmarks/coverage.py [--cases 4000]

Each row draws problems or seeds of a known distribution, states the interval through the function that the commands
use, and counts how often it holds the truth. The cases are those that are hard for intervals: rare problems, accuracies
near 0, several samples of one problem, skewed rewards, and seeds of which one in five fails. "none" means that the
commands state no interval. The tables of docs/guides/evaluation.md are rows of this program's output.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from review.statistics.estimates import (
    difference_interval,
    estimate,
    mean_interval,
    median_interval,
    wilson_interval,
)
from review.statistics.paired import paired_difference

Interval = tuple[float, float] | None
Draw = Callable[[random.Random], float]
COUNTS = (3, 5, 10, 20, 50, 100, 512)
SEEDS = (3, 4, 5, 6, 8, 10, 20)
SAMPLES = 8
ROUNDING = 1e-12


@dataclass(frozen=True)
class Kind:
    """One kind of values: `interval` draws so many of them and states their interval, which should hold `truth`."""

    name: str
    truth: float
    interval: Callable[[random.Random, int], Interval]
    counts: Sequence[int] = COUNTS


def coverage(kind: Kind, count: int, cases: int, seed: int = 0) -> float | None:
    """The share of stated intervals that hold the truth; None if none is stated."""
    chance = random.Random(f"{seed} {kind.name} {count}")
    stated, held = 0, 0
    for _ in range(cases):
        interval = kind.interval(chance, count)
        if interval is None:
            continue
        stated += 1
        held += interval[0] - ROUNDING <= kind.truth <= interval[1] + ROUNDING
    return held / stated if stated else None


def share_correct(accuracy: float, samples: int, chance: random.Random) -> float:
    """The share of so many samples that are correct."""
    return sum(chance.random() < accuracy for _ in range(samples)) / samples


def accuracy_of(draw: Draw, samples: int) -> Callable[[random.Random, int], Interval]:
    """`quartet eval` of one policy: `draw` is the accuracy of a problem."""

    def interval(chance: random.Random, count: int) -> Interval:
        found = estimate([share_correct(draw(chance), samples, chance) for _ in range(count)])
        return found.low, found.high

    return interval


def band_of(accuracy: float) -> Callable[[random.Random, int], Interval]:
    """The band of the page, of a mean and the number of problems."""

    def interval(chance: random.Random, count: int) -> Interval:
        mean = share_correct(accuracy, count, chance)
        return wilson_interval(mean * count, count)

    return interval


def headline_of(first: float, second: float) -> Callable[[random.Random, int], Interval]:
    """The first sentence of the page, of two means and the number of problems."""

    def interval(chance: random.Random, count: int) -> Interval:
        before, after = (share_correct(accuracy, count, chance) for accuracy in (first, second))
        return difference_interval(before, after, (count, count))

    return interval


def pair_of(draw: Callable[[random.Random], tuple[float, float]], samples: int) -> Callable[..., Interval]:
    """`quartet eval A B` and `quartet control`: `draw` is the accuracy of a problem under each policy."""

    def interval(chance: random.Random, count: int) -> Interval:
        accuracies = [draw(chance) for _ in range(count)]
        first = [share_correct(a, samples, chance) for a, _ in accuracies]
        second = [share_correct(b, samples, chance) for _, b in accuracies]
        pair = paired_difference(first, second)
        return None if pair.low is None or pair.high is None else (pair.low, pair.high)

    return interval


def reward_pair_of(draw: Draw) -> Callable[[random.Random, int], Interval]:
    """`quartet eval A B` by a reward without verdicts: `draw` is the difference on a problem."""

    def interval(chance: random.Random, count: int) -> Interval:
        pair = paired_difference([0.0] * count, [draw(chance) for _ in range(count)], None)
        return None if pair.low is None or pair.high is None else (pair.low, pair.high)

    return interval


def seeds_of(draw: Draw) -> Callable[[random.Random, int], Interval]:
    """`quartet compare`: `draw` is the figure of one run."""
    return lambda chance, count: median_interval([draw(chance) for _ in range(count)])


def student_of(draw: Draw) -> Callable[[random.Random, int], Interval]:
    """Student's interval of the mean, which no command states: for comparison."""
    return lambda chance, count: mean_interval([draw(chance) for _ in range(count)])


def one_in_five_fails(chance: random.Random) -> float:
    return 0.05 if chance.random() < 0.2 else chance.gauss(0.7, 0.01)


def rare(usual: float, other: float, share: float) -> Draw:
    """`other` for this share of the problems, `usual` for the rest."""
    return lambda chance: other if chance.random() < share else usual


def learned(chance: random.Random) -> tuple[float, float]:
    """One problem in twenty was learned."""
    return 0.05, 0.95 if chance.random() < 0.05 else 0.05


def forgotten(chance: random.Random) -> tuple[float, float]:
    """One problem in twenty was forgotten."""
    return 0.98, 0.0 if chance.random() < 0.05 else 0.98


def skewed(chance: random.Random) -> float:
    return chance.lognormvariate(0, 1)


MEDIAN_OF_SEEDS = 0.7 + 0.01 * -0.31863936396437515  # of runs: the normal's quantile at 3/8 of those that do not fail
ACCURACIES = (
    Kind("accuracy 0.5, one sample", 0.5, accuracy_of(lambda _: 0.5, 1)),
    Kind("accuracy 0.99, one sample", 0.99, accuracy_of(lambda _: 0.99, 1)),
    Kind("accuracy 0.01, the page's band", 0.01, band_of(0.01)),
    Kind("uniform accuracies, eight samples", 0.5, accuracy_of(lambda chance: chance.random(), SAMPLES)),
    Kind("one problem in 20 solvable, eight samples", 0.0545, accuracy_of(rare(0.01, 0.9, 0.05), SAMPLES)),
    Kind("one problem in 10 unsolvable, eight samples", 0.855, accuracy_of(rare(0.95, 0.0, 0.1), SAMPLES)),
)
DIFFERENCES = (
    Kind("0.5 to 0.6, the page's sentence", 0.1, headline_of(0.5, 0.6)),
    Kind("0.01 to 0.03, the page's sentence", 0.02, headline_of(0.01, 0.03)),
    Kind("one problem in 20 learned, one sample", 0.045, pair_of(learned, 1)),
    Kind("one problem in 20 learned, eight samples", 0.045, pair_of(learned, SAMPLES)),
    Kind("one problem in 20 forgotten, eight samples", -0.049, pair_of(forgotten, SAMPLES)),
    Kind("rewards, log-normal", math.exp(0.5), reward_pair_of(skewed)),
    Kind("rewards, one in 50 is 10 lower", -0.2, reward_pair_of(rare(0.0, -10.0, 0.02))),
)
RUNS = (
    Kind("one run in five fails", MEDIAN_OF_SEEDS, seeds_of(one_in_five_fails), SEEDS),
    Kind("log-normal", 1.0, seeds_of(skewed), SEEDS),
    Kind("normal", 0.0, seeds_of(lambda chance: chance.gauss(0, 1)), SEEDS),
)
NOT_STATED = (
    Kind("Student's t of the mean, one run in five fails", 0.57, student_of(one_in_five_fails), SEEDS),
    Kind("Student's t of the mean, log-normal", math.exp(0.5), student_of(skewed), SEEDS),
)
TABLES = {
    "accuracy": ACCURACIES,
    "difference of two policies": DIFFERENCES,
    "median over seeds": RUNS,
    "not stated": NOT_STATED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the stated intervals hold.")
    parser.add_argument("--cases", type=int, default=4000, help="simulated evaluations of each kind and number")
    cases = parser.parse_args().cases
    for title, kinds in TABLES.items():
        print("|", " | ".join([title, *map(str, kinds[0].counts)]), "|")
        print("|---" * (1 + len(kinds[0].counts)) + "|")
        for kind in kinds:
            found = [coverage(kind, count, cases) for count in kind.counts]
            cells = ["none" if share is None else f"{share:.3f}" for share in found]
            print("|", " | ".join([kind.name, *cells]), "|", flush=True)
        print()


if __name__ == "__main__":
    main()
