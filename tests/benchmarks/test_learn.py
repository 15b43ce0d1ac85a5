"""The bench of sample efficiency: its figures by hand, and what its contenders do to a batch."""

import doctest
from math import sqrt

import pytest
import torch

from benchmarks.learn import figures
from benchmarks.learn.contenders import maxrl, replay
from grpo.algorithm.own import estimate
from grpo.learner.batch import TrainingBatch
from grpo.learner.row import PackedRow, Sample


def test_doctests():
    options = doctest.ELLIPSIS
    assert doctest.testmod(maxrl, extraglobs={"torch": torch}).failed == 0
    assert doctest.testmod(figures, optionflags=options).failed == 0


def test_a_rising_curve_is_the_nearest_one_by_squares():
    assert figures.rising([3.0, 1.0, 2.0]) == [2.0, 2.0, 2.0]  # 3 and 1 make 2, which does not exceed 2
    assert figures.rising([1.0, 4.0, 1.0, 1.0]) == [1.0, 2.0, 2.0, 2.0]


def test_a_lucky_evaluation_does_not_count_as_reached():
    assert figures.needed([0, 1, 2, 3], [0.5, 0.8, 0.5, 0.8], 0.75) == pytest.approx(2 + 0.10 / 0.15)
    assert figures.needed([0, 1, 2], [0.5, 0.6, 0.7], 0.75) is None
    assert figures.needed([5, 6], [0.8, 0.9], 0.75) == 5.0


def test_accuracy_at_a_budget_ends_with_the_curve():
    assert figures.at([0, 10], [0.5, 0.7], 5) == pytest.approx(0.6)
    assert figures.at([0, 10], [0.5, 0.7], 50) == 0.7


def test_an_interval_of_five_seeds():
    """1 … 5: mean 3, standard deviation √2.5, t = 2.776: 2.776 · √2.5 / √5 = 1.963."""
    mean, half = figures.interval([1, 2, 3, 4, 5])
    assert (mean, half) == (3, pytest.approx(2.776 * sqrt(2.5) / sqrt(5)))


def test_maxrl_divides_by_the_mean():
    name = maxrl.OPTIONS["loss.advantage"]
    advantages, tied = estimate(name, [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [[1] * 4] * 2, None)
    assert advantages.tolist() == [[1.0, 1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]  # (1 - 1/2) / (1/2)
    assert tied.tolist() == [False, True]


def _batch(step, version, *advantages):
    rows = [
        PackedRow([7], [Sample(2 * g, [1, 2], [-0.1, -0.2], a), Sample(2 * g + 1, [3], [-0.3], -a)], group=g)
        for g, a in enumerate(advantages)
    ]
    return TrainingBatch(
        rows, torch.zeros(len(rows), 2), 2 * len(rows), 3 * len(rows), step, tokens_by_version={version: 3 * len(rows)}
    )


def test_replay_adds_what_was_not_tied_with_the_version_that_sampled_it():
    listener = replay.Replay(steps=1)
    first = listener.prepare(_batch(1, 0, 0.5, 0.0))
    assert len(first.rows) == 2
    second = listener.prepare(_batch(2, 1, 0.0, 0.25))
    assert [row.group for row in second.rows] == [0, 1, 2]
    assert [sample.index for row in second.rows for sample in row.samples] == [0, 1, 2, 3, 4, 5]
    assert second.rows[2].samples[0].advantage == 0.5
    assert second.rows[2].samples[0].sampling_logprobs == [-0.1, -0.2]
    assert (second.num_samples, second.num_completion_tokens) == (6, 9)
    assert second.tokens_by_version == {1: 6, 0: 3}
    assert second.age(version=1) == 3 / 9  # of one version, a third of the tokens: the correction is on
    third = listener.prepare(_batch(3, 2, 0.0, 0.0))
    assert [row.samples[0].advantage for row in third.rows] == [0.0, 0.0, 0.25]  # the first step is too old
