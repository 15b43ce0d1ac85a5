"""Contract 8: where the sampler is not the learner, the importance correction is on, and the cause is told."""

from dataclasses import replace

import pytest
import torch
from recorded import groups_of
from small_learner import last_work, small_learner, watched

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner import build
from grpo.learner.learner import Learner
from grpo.train import train
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.records import read_rollouts


def learner_of(policy, **loss) -> Learner:
    return small_learner(policy, LearnerOptions(), MTPOptions(depth=1), LossOptions(**loss))


def steps(learner: Learner, versions: list[int]) -> list[dict[str, float]]:
    """A step on rollouts of each of these versions."""
    found = []
    for number, version in enumerate(versions, start=1):
        groups, scores = groups_of(2)
        groups = [
            replace(group, completions=[replace(c, policy_version=version) for c in group.completions])
            for group in groups
        ]
        found.append(learner.step(learner.prepare(groups, scores), number))
    return found


def test_contract_8_rollouts_of_an_older_version_are_corrected(random_policy):
    first, second, third = steps(learner_of(random_policy(1)), [0, 1, 0])
    for fresh in (first, second):
        assert {"mismatch/age_mean", "mismatch/weight_mean"}.isdisjoint(fresh)
    assert third["mismatch/age_mean"] == 2
    assert third["mismatch/weight_mean"] != 1


def test_the_age_is_a_mean_over_tokens(random_policy):
    learner = learner_of(random_policy(1))
    groups, scores = groups_of(2)
    for completion in groups[1].completions:
        completion.policy_version = 3
    batch = learner.prepare(groups, scores)
    old, new = (sum(len(c.token_ids) for c in group.completions) for group in groups)
    assert batch.tokens_by_version == {0: old, 3: new}
    assert batch.age(3) == pytest.approx(3 * old / (old + new))
    assert batch.age(0) == 0  # a sampler that is ahead is none


@pytest.mark.parametrize(
    ("options", "backend", "corrects"),
    [({}, None, False), ({"dtype": "bfloat16"}, None, True), ({}, "transformers", False), ({}, "vllm", True)],
)
def test_contract_8_precision_and_backend_decide(
    micro_config, micro_policy, tmp_path, monkeypatch, options, backend, corrects
):
    if backend:
        monkeypatch.setattr(Policy, "backend", backend)
    config = micro_config(tmp_path, **options)
    policy = micro_policy().cast(getattr(torch, config.dtype))
    learner = watched(build.grpo_learner(policy, config, {}))
    metrics = learner.step(learner.prepare(*groups_of(2)), 1)
    assert ("mismatch/weight_mean" in metrics) == corrects
    assert {"mismatch/logprob_abs_mean", "mismatch/logprob_abs_max", "mismatch/kl"} <= metrics.keys()
    assert last_work(learner).fixed["policy"].correction == ("token_truncate" if corrects else None)


def test_every_token_is_recorded_with_both_log_probabilities(micro_config, tmp_path):
    train(micro_config(tmp_path / "run", steps=2, **{"sft.steps": 0}))
    lines = [line for step in (1, 2) for line in read_rollouts(tmp_path / "run", step)]
    learned = [line for line in lines if line["policy_logprobs"] is not None]
    assert len(learned) > len(lines) / 2
    for line in learned:
        assert line["policy_logprobs"] == pytest.approx(line["logprobs"], abs=1e-4)
    assert {line["backend"] for line in lines} == {"native"}
    assert [{line["policy_version"] for line in read_rollouts(tmp_path / "run", step)} for step in (1, 2)] == [{0}, {1}]
    metrics = read_metrics(tmp_path / "run")
    assert all(0 < line["sync_check/logprob_abs_mean"] < 1e-4 for line in metrics if "learner/updates" in line)
