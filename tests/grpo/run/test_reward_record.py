"""What a reward function leaves in the run's record, and what its failures do to advantages."""

import hashlib

import pytest
import torch
from reward_workers import reward_workers
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.run.reward_record import read_rewards
from grpo.run.stop import Stopped
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import read_events, read_metrics
from rewards.config.data import SourceOptions
from rewards.config.reward import RewardOptions, ScoringOptions
from rewards.group_score import RewardFailed
from rewards.records import read_rollouts
from rollout.group import Completion, Prompt, RolloutGroup

SOURCE = """
from rewards import per_completion

@per_completion
def talks(completion, completion_ids, answer, trainer_state, log_extra, log_metric):
    log_extra("letters", sum(c.isalpha() for c in completion))
    log_extra("gold", answer)
    log_metric("steps_done", trainer_state.global_step)
    log_metric("share_done", trainer_state.global_step / trainer_state.max_steps)
    return len(completion_ids) / 10
"""


QUICK = {"sft.steps": 0, "eval.limit": 0, "rollout.max_completion_tokens": 6}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def stopped(file, micro_config):
    """The configuration of a run that was stopped after a step of three."""
    config = micro_config(file.parent / "run", rewards=[{"function": f"{file}:talks"}], **QUICK)
    with pytest.raises(Stopped):
        train(config, stop_after=1)
    return config


def test_extras_metrics_and_state_land_in_the_record(file, micro_config):
    folder = file.parent / "run"
    rewards = [{"function": f"{file}:talks"}, {"function": "gsm8k", "weight": 0.5, "name": "right"}]
    train(micro_config(folder, rewards=rewards, **QUICK | {"eval.limit": 2}))
    for step in (1, 2, 3):
        for line in read_rollouts(folder, step):
            assert line["extras"]["letters"] == sum(c.isalpha() for c in line["text"])
            assert line["extras"]["gold"].rpartition("####")[2].strip().isdigit()
            assert line["parts"] == {"talks": len(line["token_ids"]) / 10, "right": line["parts"]["right"]}
    metrics = {line["step"]: line for line in read_metrics(folder)}
    assert [metrics[step]["reward/metric/steps_done"] for step in (1, 2, 3)] == [0.0, 1.0, 2.0]
    assert metrics[3]["reward/metric/share_done"] == pytest.approx(2 / 3)

    talks, right = read_rewards(folder)
    assert (talks["name"], talks["path"]) == ("talks", str(file))
    assert talks["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (right["function"], right["name"], right["weight"], right["sha256"]) == ("gsm8k", "right", 0.5, None)


def test_a_resumed_run_refuses_a_changed_reward_and_no_other_change_of_its_file(file, stopped):
    folder = stopped.output_dir
    file.write_text(f"# mine\n{SOURCE}\ndef unrelated():\n    return 1\n")
    with pytest.raises(Stopped):
        train(stopped, resume="auto", stop_after=2)
    assert "rewards_changed" not in [event["event"] for event in read_events(folder)]
    file.write_text(SOURCE.replace("/ 10", "/ 20"))
    with pytest.raises(ValueError, match=r"mine.py holds another reward function .* force=True"):
        train(stopped, resume="auto")
    former = read_rewards(folder)
    train(stopped, resume="auto", force=True)
    events = read_events(folder)
    [event] = [event for event in events if event["event"] == "rewards_changed"]
    assert event["former"] == former
    assert read_rewards(folder)[0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() != former[0]["sha256"]
    assert not [event for event in events if event["event"] == "undocumented_metric"]


MENDABLE = """
STEPS = {}

def fails(completions, trainer_state, **_):
    if trainer_state.global_step == 1:
        raise ValueError("boom")
    return [float(len(c)) for c in completions]

def other(completions, **_):
    return [1.0] * len(completions)
"""


@pytest.mark.slow
def test_a_mended_function_resumes_after_its_failure(micro_config, tmp_path):
    """As the message asks for; and not a second time, nor another function of the file."""
    file, folder = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(MENDABLE)
    rewards = [{"function": f"{file}:fails"}, {"function": f"{file}:other"}]
    config = micro_config(folder, rewards=rewards, **QUICK)
    with pytest.raises(RewardFailed, match="boom"):
        train(config)
    mended = MENDABLE.replace('raise ValueError("boom")', "return [0.0] * len(completions)")
    file.write_text(mended.replace("[1.0]", "[2.0]"))
    with pytest.raises(ValueError, match=r"mine.py holds another reward function 'other' .*force=True"):
        train(config, resume="auto")
    file.write_text(mended)
    train(config, resume="auto")
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]
    events = read_events(folder)
    [event] = [event for event in events if event["event"] == "reward_mended"]
    assert event["functions"] == ["fails"]
    assert event["former"][0]["code_sha256"] != read_rewards(folder)[0]["code_sha256"]
    assert not [event for event in events if event["event"] == "rewards_changed"]
    file.write_text(mended.replace("float(len(c))", "0.5"))
    with pytest.raises(ValueError, match=r"mine.py holds another reward function 'fails'"):
        train(config, resume="auto")


FAULTY = """
import os, time

ODD = {"nan": float("nan"), "inf": float("inf"), "none": None}

def faulty(completions, **_):
    rewards = []
    for text in completions:
        if text == "raise":
            raise ValueError("boom")
        if text == "hang":
            time.sleep(60)
        if text == "die":
            os._exit(3)
        if text != "short":
            rewards.append(ODD[text] if text in ODD else float(text) if len(text) < 5 else 1.0)
    return rewards
"""
ESTIMATORS = [
    {},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"advantage": "rloo"},
    {"advantage": "reinforce_plus_plus"},
    {"advantage": "reinforce_plus_plus_baseline"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


@pytest.fixture(scope="module")
def learners(micro_policy):
    policy = micro_policy(0)
    weights = {"faulty": 1.0, "gsm8k_format": 0.5}
    return [
        small_learner(policy, LearnerOptions(), MTPOptions(), LossOptions(**options), reward_weights=weights)
        for options in ESTIMATORS
    ]


@pytest.mark.parametrize("fault", ["raise", pytest.param("hang", marks=pytest.mark.slow), "die", "short", "nan", "inf"])
def test_advantages_under_drop_sample_equal_those_of_the_remaining_seven(tmp_path, learners, fault):
    """One of eight completions fails; the learner gets the batch that the other seven make."""
    (tmp_path / "own.py").write_text(FAULTY)
    rewards = [RewardOptions(function=f"{tmp_path}/own.py:faulty"), RewardOptions(function="gsm8k_format", weight=0.5)]
    seven = ["0.1", "0.9", "0.4", "-2", "0.35", "7", "0.2"]
    second = ["1", "2", "3", "4", "5", "6", "8"]

    def group(name: str, texts: list[str]) -> RolloutGroup:
        completions = [Completion([5 + i, 6], [-1.0, -2.0], text, "stop", 0) for i, text in enumerate(texts)]
        return RolloutGroup(Prompt(name, "?", [7, 8], {"answer": "#### 1"}), completions)

    data = SourceOptions(task_options={"levels": [1]}, limit=4)
    scoring = ScoringOptions(on_error="drop_sample", timeout_s=0.8)
    with Task(data, rewards, scoring) as task:
        with_fault = [group("a", [*seven[:4], fault, *seven[4:]]), group("b", [*second, fault])]
        scores = task.score(with_fault)
        assert [score.rewards[at] for score, at in zip(scores, (4, 7), strict=True)] == [None, None]
        assert [[error.sample_index for error in score.errors] for score in scores] == [[4], [7]]
        without = [group("a", seven), group("b", second)]
        expected_scores = task.score(without)
    for learner in learners:
        batch, expected = learner.prepare(with_fault, scores), learner.prepare(without, expected_scores)
        for row, at in enumerate((4, 7)):
            left = [i for i in range(8) if i != at]
            assert torch.equal(batch.advantages[row, left], expected.advantages[row])
            assert batch.advantages[row, at] == 0
        assert batch.advantages.abs().sum() > 1
        ids = [sample.token_ids for packed in batch.rows for sample in packed.samples]
        assert len(ids) == 14  # the failed ones are not trained on
        assert (batch.num_samples, batch.num_completion_tokens) == (
            *(expected.num_samples, expected.num_completion_tokens),
        )
    assert not reward_workers()
