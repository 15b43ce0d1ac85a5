"""Batches that are sampled ahead: the same bits whatever the timing, and nothing lost by a stop (contract 12)."""

import random
import time

import pytest
import ray

from grpo.collector import Collector
from grpo.learner.learner import Learner
from grpo.run import checkpoint
from grpo.run.records import read_metrics, read_rollouts
from grpo.run.stop import Stopped
from grpo.task import Task
from grpo.train import train
from rewards.group_score import RewardFailed, RewardFailure
from rollout.pool import start_ray

AHEAD = {"rollout.ahead": 1, "steps": 6, "eval.limit": 3, "eval.every": 3, "checkpoint.every": 2}
HARD = {"curriculum.by_difficulty": True, "rollout.refill_draws": 1, "rollout.refill_prompts": "new"}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    start_ray(3)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "run"
    train(micro_config(folder, **AHEAD | HARD))
    return folder


def kept(folder, step: int) -> dict:
    """Everything of a checkpoint: tensors as bytes, and the state."""
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    tensors = {
        (kind, name): t.numpy().tobytes() for kind, mapping in saved.tensors.items() for name, t in mapping.items()
    }
    for drawn in saved.state.get("batches", {}).get("batches", {}).values():
        drawn["metrics"] = {name: value for name, value in drawn["metrics"].items() if not name.startswith("time/")}
    return tensors | {"state": {name: part for name, part in saved.state.items() if name not in ("log", "unwritten")}}


def untimed(folder) -> list[dict]:
    parts = ("time/", "speed/", "memory/", "run/", "publish/")
    return [{k: v for k, v in line.items() if not k.startswith(parts)} for line in read_metrics(folder)]


def same(folder, other) -> None:
    assert untimed(folder) == untimed(other)
    for step in (2, 4, 6):
        assert kept(folder, step) == kept(other, step)
    for step in range(1, 7):
        assert read_rollouts(folder, step) == read_rollouts(other, step)


def test_contract_12_a_batch_has_the_weights_of_its_schedule(whole):
    versions = [{row["policy_version"] for row in read_rollouts(whole, step)} for step in range(1, 7)]
    assert versions == [{0}, {0}, {1}, {2}, {3}, {4}]
    assert [line.get("mismatch/age_mean", 0) for line in read_metrics(whole) if "loss/total" in line] == [
        0,
        1,
        1,
        1,
        1,
        1,
    ]


def test_contract_12_timing_and_workers_change_no_bit(micro_config, whole, tmp_path, monkeypatch):
    chance = random.Random(0)

    def late(owner, name):
        real = getattr(owner, name)

        def called(*arguments, **named):
            time.sleep(chance.random() / 5)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, called)

    late(Collector, "collect")
    late(Learner, "step")
    train(micro_config(tmp_path / "run", **AHEAD | HARD | {"rollout.workers": 2}))
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("stop", [2, 3])  # before and after an evaluation
def test_contract_12_a_stopped_run_goes_on_with_the_batch_in_flight(micro_config, whole, tmp_path, stop):
    config = micro_config(tmp_path / "run", **AHEAD | HARD)
    with pytest.raises(Stopped):
        train(config, stop_after=stop)
    saved = checkpoint.load(tmp_path / f"run/checkpoints/step_{stop:06d}").state["batches"]
    assert list(saved["batches"]) == [str(stop + 1)]
    train(config, resume="auto")
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("call", [4, 5, 6])
def test_contract_9_a_failure_ahead_of_its_time_saves_the_last_whole_step(
    micro_config, whole, tmp_path, monkeypatch, call
):
    """The reward of a batch that is sampled ahead fails: the step in progress is undone, and no bit is lost."""
    folder, real, calls = tmp_path / "run", Task.score, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))
        return real(*arguments)

    config = micro_config(folder, **AHEAD | HARD)
    with monkeypatch.context() as patch:
        patch.setattr(Task, "score", failing)
        with pytest.raises(RewardFailed, match="boom"):
            train(config)
    train(config, resume="auto")
    assert kept(folder, 6) == kept(whole, 6)


def test_ahead_0_is_the_run_without_the_option(micro_config, tmp_path):
    for name, given in (("plain", {}), ("zero", {"rollout.ahead": 0})):
        train(micro_config(tmp_path / name, **HARD | given))
    assert kept(tmp_path / "plain", 3) == kept(tmp_path / "zero", 3)
    assert "batches" not in checkpoint.load(tmp_path / "zero/checkpoints/step_000003").state
