"""The simulation of more nodes: small cases by hand, and the forwards of real shards."""

import doctest

import pytest

from benchmarks import simulate
from benchmarks.simulate import Batch, Cluster, Costs, equal, forwards, hand_out, lengths_of, schedule, shard_seconds
from grpo.train import train
from rollout.depth import CostTable
from rollout.group import shards
from rollout.shard import Decoding

FLAT = CostTable([1], [[10.0]])


def test_the_examples_of_its_docstrings():
    assert doctest.testmod(simulate).failed == 0


def test_a_step_is_as_long_as_its_parts_by_hand():
    """Two shards of 4 and 2 forwards of 10 ms: 60 ms with one sampler, 40 with two. Learning takes 0.5 s a token,
    scoring 0.25 s a completion."""
    groups = [[4, 2], [2, 2]]
    assert [hand_out([shard_seconds([group], FLAT) for group in groups], workers) for workers in (1, 2)] == [0.06, 0.04]
    costs = Costs(FLAT, 0.5, publish=3.0, publish_bytes=100.0, score_per_completion=0.25)
    same = [[3, 1], [1, 3]]  # whichever two are drawn, they have 8 tokens and last 60 ms in two shards
    one = simulate.simulate(costs, same, Cluster(1, workers=1, prompts=2, prompts_per_shard=1), ahead=0)
    assert one["step_s"] == pytest.approx(0.06 + 4 * 0.25 + 8 * 0.5 + 3.0)
    assert one["samplers_idle"] == pytest.approx(1 - 0.06 / 8.06)
    assert one["learner_idle"] == pytest.approx(1 - 4 / 8.06)
    two = simulate.simulate(costs, same, Cluster(2, workers=1, prompts=2, prompts_per_shard=1, bandwidth=50.0), ahead=1)
    assert two["step_s"] == pytest.approx(
        3.0 + 100 / 50 + 4.0
    )  # learning 16 tokens on two ranks hides 2.06 s of sampling


def test_a_slow_batch_is_hidden_by_two_ahead_and_not_by_one():
    """Batch 4 takes 5 s, the others 1 s; learning takes 2 s, publishing nothing. With one ahead, step 3 waits for
    batch 4 from 8 to 10... by hand below; with two ahead, it began when step 2 did."""
    batches = [Batch(1 if number != 4 else 5, 0, 0, 2) for number in range(1, 7)]
    # ahead 1: batches begin when the step before them does: 0 1 3 5 10 12; steps end at 3 5 10 12 14 16
    assert schedule(batches, 0, ahead=1) == [3, 5, 10, 12, 14, 16]
    # ahead 2: batch 3 begins at 2, batch 4 at 3 and is ready at 8; step 2 ends at 5, step 3 at 8, when batch 5 begins
    assert schedule(batches, 0, ahead=2) == [3, 5, 8, 10, 12, 14]
    assert schedule(batches, 0, ahead=0) == [3, 6, 9, 16, 19, 22]


def test_equal_lengths_have_the_same_mean():
    assert equal([[1, 5], [3, 3]]) == [[3, 3], [3, 3]]


def test_the_simulated_forwards_are_those_of_a_real_run(micro_config, tmp_path, monkeypatch):
    """Of every shard, and so of one worker or of two that share them: counts, no times."""
    real, counted = Decoding.forward, list[Decoding]()

    def forward(self):
        counted.append(self)
        real(self)

    monkeypatch.setattr(Decoding, "forward", forward)
    options = {"steps": 1, "warm_start.steps": 0, "rollout.draft_tokens": 0, "eval.limit": 0}
    config = micro_config(tmp_path / "run", **options)
    train(config)
    groups = lengths_of(tmp_path / "run")
    assert [len(group) for group in groups] == [config.rollout.group_size] * config.prompts_per_step
    of_step = [decoding for decoding in dict.fromkeys(counted) if decoding.params.group_size == 4]
    predicted = [forwards(shard) for shard in shards(groups, config.rollout.prompts_per_shard)]
    assert [counted.count(decoding) for decoding in of_step] == predicted
    assert len(predicted) == 2
    assert hand_out(predicted, workers=1) == len([d for d in counted if d in of_step])
