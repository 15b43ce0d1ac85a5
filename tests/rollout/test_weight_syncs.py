"""The promises about rollouts, checked again after two publications with a step of GRPO between them."""

from collections import Counter
from dataclasses import replace

import pytest
from engine_cases import PARAMS, PROMPTS, assert_lossless, completions, enumerated, taught, tokens
from frequencies import z_score
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.cost_table import CostTable
from rollout.decoding.engine import Engine
from rollout.group import Prompt, RolloutGroup
from rollout.pool import PoolOptions
from rollout.sampling import SamplingParams
from rollout.workers.local_pool import LocalPool

CHEAP = CostTable(rows=[1], rounds=[[1.0, 1.01, 1.02, 1.03, 1.04]])


def updated(learner: Learner, groups: list[RolloutGroup], step: int) -> dict[str, float]:
    """A step of GRPO with rewards that no group is tied in, and of the head; returns its metrics."""
    marks = [[float(i % 2) for i, _ in enumerate(group.completions)] for group in groups]
    return learner.step(learner.prepare(groups, [GroupScore(row, {"marks": row}) for row in marks]), step)


def learner_of(policy: Policy, temperature: float) -> Learner:
    options = LearnerOptions(learning_rate=5e-3)
    return small_learner(policy, options, MTPOptions(depth=3), LossOptions(), temperature=temperature)


@pytest.mark.slow
def test_contracts_2_3_and_4_hold_after_two_publications_with_an_update_between(random_policy):
    """The learner's own log-probabilities of packed groups, here, and not the stock model's."""
    routed = {"q_lora_rank": 10, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
    policy, prompts = taught(random_policy(17, **routed), PARAMS.temperature, steps=8), PROMPTS[:4]
    params = replace(PARAMS, max_completion_tokens=20, group_size=3)
    learner, pool = learner_of(policy, params.temperature), LocalPool(policy, PoolOptions(prompts_per_shard=3))
    seen = []
    for version in (1, 2):
        pool.sync_weights(learner.weights(), version)
        engine = pool.engine
        assert_lossless(engine, prompts, params, depths=(1, 9))
        assert_lossless(engine, prompts, replace(params, temperature=0.0, group_size=1), depths=(3,))
        plain = tokens(engine.sample(prompts, params))
        for max_rows, drafts in ((1, 3), (9, None)):  # rows that wait; the controller
            few = Engine(engine.policy, max_rows=max_rows, costs=CHEAP)
            assert tokens(few.sample(prompts, replace(params, draft_tokens=drafts))) == plain
        groups = pool.sample(prompts[::-1], replace(params, draft_tokens=2))[::-1]
        assert tokens(groups) == plain
        assert {c.policy_version for c in completions(groups)} == {version}
        metrics = updated(learner, groups, version)
        assert 0 < metrics["mismatch/logprob_abs_mean"] < 1e-5
        assert metrics["mismatch/logprob_abs_max"] < 1e-4
        seen.append(plain)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("draft_tokens", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_contract_3_the_distribution_is_the_updated_policys(random_policy, draft_tokens):
    policy = random_policy(16, vocab_size=6)
    learner, engine = learner_of(policy, 0.8), Engine(random_policy(99, vocab_size=6))
    params = SamplingParams(20_000, 0.8, 3, (2,), seed=1, draft_tokens=draft_tokens)
    prompt, before = Prompt("toy", "", [3, 4]), enumerated(policy, [3, 4], 0.8, length=3, stop=2)
    engine.sync_weights(learner.weights(), 1)
    updated(learner, engine.sample([prompt], replace(params, group_size=8)), 1)
    engine.sync_weights(learner.weights(), 2)
    [group] = engine.sample([prompt], params)
    counts = Counter(tuple(completion.token_ids) for completion in group.completions)
    assert abs(z_score(counts, enumerated(policy, [3, 4], 0.8, length=3, stop=2))) < 4
    assert z_score(counts, before) > 8  # the update is seen
