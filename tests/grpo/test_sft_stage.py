import copy
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from start_ranks import end_of, start_ranks

from grpo.config.run import LogOptions, SftConfig
from grpo.evaluation.best_point import BestPoint
from grpo.learner.learner import Learner
from grpo.learner.parallel import ONE_PROCESS
from grpo.learner.update import NonFiniteStep
from grpo.run.log import RunLog
from grpo.session import Session
from grpo.steps.loop import Run
from grpo.steps.supervise import supervise, supervised_session
from grpo.task.task import Task
from policies.policy import Policy
from rewards.config.options import dump_yaml


def _warm(policy: Policy, config, folder, console=None) -> dict[str, float]:
    with Task.of(config) as task, RunLog(folder, "", LogOptions(trackers=[]), quiet=True, console=console) as log:
        where = {"checkpoints": folder / "warm_start_checkpoints", "saved": None}
        run = Run(config, log, ONE_PROCESS, last=config.supervision.steps, of=" of the SFT stage", **where)
        session = supervised_session(Session, run, task, policy)
        supervise(session, BestPoint(session, folder / "best"))
        return dict(run.metrics)


def _config(micro_config, folder, **given):
    return micro_config(folder, **{"sft.steps": 4, "sft.batch_size": 4} | given)


def _moved(policy: Policy, before: Policy) -> set[str]:
    former = dict(before.named_parameters())
    return {name for name, p in policy.named_parameters() if not torch.equal(p, former[name])}


def _events(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_the_policy_learns_the_solutions_in_place_and_its_head_beside_it(micro_policy, micro_config, tmp_path):
    policy, console = micro_policy(0), Console(file=io.StringIO(), width=200)
    before = copy.deepcopy(policy)
    config = _config(micro_config, tmp_path, **{"sft.steps": 25, "sft.warmup_steps": 5, "mtp.learning_rate": 1e-2})
    metrics = _warm(policy, config, tmp_path / "r", console)
    assert "24/25" in console.file.getvalue()
    assert "25/25" in console.file.getvalue()
    assert 0 < metrics["loss/sft"] < 3.0 < 5.5 < math.log(len(policy.tokenizer))  # where an untrained policy begins
    assert 0 < metrics["loss/mtp"] < 1.5
    assert len(_moved(policy, before)) == len(dict(policy.named_parameters()))
    assert metrics["learner/learning_rate"] == pytest.approx(1e-2 / 20)  # linear, the last of 20 behind the warm-up


def test_the_same_seed_gives_the_same_bits_and_another_order_does_not(micro_policy, micro_config, tmp_path):
    policies = [micro_policy(0) for _ in range(3)]
    for i, (policy, seed) in enumerate(zip(policies, (0, 0, 1), strict=True)):
        _warm(policy, _config(micro_config, tmp_path, seed=seed, **{"data.limit": 24}), tmp_path / str(i))
    assert not _moved(policies[1], policies[0])
    assert _moved(policies[2], policies[0])


def test_every_example_is_seen_before_one_comes_again(micro_policy, micro_config, tmp_path, monkeypatch):
    seen: list[list[int]] = []
    forward_backward = Learner.forward_backward

    def note(self, batch, *rest):
        seen.extend(row.prompt_token_ids for row in batch.rows)
        return forward_backward(self, batch, *rest)

    monkeypatch.setattr(Learner, "forward_backward", note)
    _warm(micro_policy(0), _config(micro_config, tmp_path, **{"sft.steps": 6}), tmp_path / "r")
    assert len(seen) == 24 == len({tuple(ids) for ids in seen})


@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_head_is_taught_in_every_step(micro_policy, micro_config, tmp_path, command):
    config = _config(micro_config, tmp_path, **{"sft.steps": 3})
    if command == "sft":
        given = {name: getattr(config, name) for name in ("model", "output_dir", "threads", "data", "rewards")}
        config = SftConfig(**given, steps=3, prompts_per_step=4, mtp={"depth": 2}, log={"trackers": []})
    assert "loss/mtp" in _warm(micro_policy(0), config, tmp_path / "a")  # of the last step


def test_without_a_loss_weight_the_head_stays_as_it_is(micro_policy, micro_config, tmp_path):
    policy = micro_policy(0)
    before = copy.deepcopy(policy)
    metrics = _warm(policy, _config(micro_config, tmp_path, **{"mtp.loss_weight": 0.0}), tmp_path / "r")
    assert "loss/mtp" not in metrics
    moved = _moved(policy, before)
    assert moved
    assert not any(name.startswith("mtp.") for name in moved)


def test_an_sft_stage_that_diverges_says_so(micro_policy, micro_config, tmp_path):
    policy = micro_policy(0)
    with torch.no_grad():
        policy.lm_head[0, 0] = math.nan
    with pytest.raises(NonFiniteStep, match=r"step 1: the loss is nan.*Lower sft.learning_rate"):
        _warm(policy, _config(micro_config, tmp_path), tmp_path / "r")
    [event] = [event for event in _events(tmp_path / "r") if event["event"] == "non_finite"]
    assert len(set(event["examples"])) == 4


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.25, 0.75, 0.5, 0.75], [1, 2, 2, 2]),
        ([-20.0, -16.5, -18.0, -17.0], [1, 2, 2, 2]),  # mean rewards may be below every accuracy
        ([None, None, None, None], [0, 0, 0, 4]),  # a reward that abstains chooses nothing
    ],
    ids=["accuracy", "negative rewards", "no score"],
)
def test_grpo_begins_with_the_best_point_by_the_validation_problems(micro_config, tmp_path, values, best):
    """Of ten points the one that answers them best is saved; they are no training problems, and the last point is none
    where an earlier one was better."""
    answers = iter(values)
    kept = []

    class Looked(BestPoint):
        def _answer(self, pool):
            return SimpleNamespace(accuracy=None, reward_mean=next(answers))

        def look(self, step):
            seen = super().look(step)
            kept.append((step, self.step))
            return seen

    config = _config(micro_config, tmp_path / "run", **{"data.validation": 4})
    with Task.of(config) as task, RunLog(tmp_path / "run", "", LogOptions(trackers=[]), quiet=True) as log:
        run = Run(config, log, ONE_PROCESS, checkpoints=tmp_path / "steps", saved=None, last=4, of=" of the SFT stage")
        session = supervised_session(Session, run, task)
        supervise(session, Looked(session, tmp_path / "best"))
    assert kept == list(enumerate(best, start=1))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["accuracy"] for e in events if e["event"] == "validation"] == values
    assert (tmp_path / "best/config.json").is_file()


@pytest.mark.slow
def test_several_ranks_answer_the_validation_problems_together(micro_config, random_policy, tmp_path):
    """The samplers need the whole weights, which every rank has a share of."""
    random_policy(0).save(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "device": "cpu", "sft.steps": 2, "steps": 1, "data.validation": 4}
    given |= {"rewards": [{"function": "gsm8k_format", "weight": -2.0}], "rollout.max_completion_tokens": 4}
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(micro_config(tmp_path / "run", **given)))
    end = end_of(start_ranks(["-m", "grpo", "train", str(file)]), timeout=100)
    assert [code for code, _, _ in end] == [0, 0], end
    events = _events(tmp_path / "run")
    assert [event["step"] for event in events if event["event"] == "validation"] == [1, 2]
    assert (tmp_path / "run/warm_start/config.json").is_file()
