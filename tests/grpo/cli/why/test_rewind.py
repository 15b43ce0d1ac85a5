"""A run's recorded steps, taken again: from a checkpoint and from the start, to the bits that the run had."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from grpo.cli.why.rewind import Rewind, difference, read_config
from grpo.learner.learner import Learner
from grpo.learner.terms import draft_head
from grpo.run import checkpoint
from grpo.run.records import read_metrics
from grpo.task.task import Task
from grpo.train import train
from rollout.depth import draft_gain

KINDS = {
    "full": {},
    "preset": {"warm_start.steps": 0, "rollout.draft_tokens": None},
    "lora": {"lora.rank": 4, "loss.beta": 0.1},
    "ppo": {"loss.advantage": "gae", "loss.beta": 0.1, "learner.updates_per_batch": 2},
    "bfloat16": {"dtype": "bfloat16"},
    "ahead": {"rollout.ahead": 1, "balance.bias_rate": 0.01},
}


def replayed(folder: Path, step: int, begins: int) -> Learner:
    """The learner after `step`, by the records from the step `begins` on."""
    config = read_config(folder)
    with Task.of(config, scores=False) as task:
        rewind = Rewind(config, step, task)
        assert rewind.begins == begins
        for each in range(rewind.begins + 1, step + 1):
            rewind.replay(each)
        return rewind.learner


def recorded_gains(folder: Path) -> list[float | None]:
    """What drafts gained in the groups of each step, which says whether the head learns from them."""
    config = read_config(folder)
    with Task.of(config, scores=False) as task:
        rewind = Rewind(config, 1, task)
        groups = [rewind.recorded(step)[0] for step in range(1, config.steps + 1)]
    return [draft_gain([c for group in of_step for c in group.completions]) for of_step in groups]


def flat(learner: Learner) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": t for kind, part in learner.state()[0].items() for name, t in part.items()}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("full", "ppo"))) for kind in KINDS]
)
def test_a_replayed_step_leaves_the_bits_of_its_checkpoint(micro_config, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(draft_head, "PAYS", math.inf)  # the head rests wherever a gain is known, also in the record
    monkeypatch.setattr(draft_head, "IDLE_EVERY", 2)
    train(micro_config(tmp_path / "run", **{"warm_start.steps": 1} | KINDS[kind]))
    root = tmp_path / "run/checkpoints"
    saved = checkpoint.load(checkpoint.saved(root)[3])
    expected = {f"{k}/{n}": t for k, part in saved.tensors.items() for n, t in part.items() if k != "ahead"}
    shutil.rmtree(checkpoint.saved(root)[2])
    for begins in (1, 0):  # one step before the last is replayed, then both, from the warm start
        found = flat(replayed(tmp_path / "run", 3, begins))
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        shutil.rmtree(checkpoint.saved(root)[1], ignore_errors=True) if begins else None
    assert recorded_gains(tmp_path / "run") == [line.get("draft/gain") for line in read_metrics(tmp_path / "run")]


def test_a_difference_is_relative_and_of_the_learner_alone():
    recorded = {"loss/policy": 0.5, "learner/grad_norm": 2.0, "loss/kl": None, "reward/mean": 1.0}
    again = {"loss/policy": 0.5, "learner/grad_norm": 1.0, "loss/kl": 1.0, "reward/mean": 9.0, "policy/entropy": 1.0}
    assert difference(recorded, again) == (2, "learner/grad_norm", 0.5)
    assert difference({}, again) == (0, "", 0.0)
