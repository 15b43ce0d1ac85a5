"""A sampler with matrices in few bits: the promises of rollouts, publications and their canaries, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, assert_lossless, completions, taught, tokens
from small_learner import last_work, small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.steps.weight_sync import WeightSync
from policies.decoding import absorbed, quantized
from policies.decoding.linear import kind_of
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.sampling import Copies
from rollout.weight_sync.rounded import logprobs_of_trunk, rounded_trunk
from rollout.workers.kinds import PoolOptions, open_pool

KINDS = ("int8", "int4")
# Of the sampler's mean |log-probability - the learner's|, in nats. This policy's weights are large, so that rounding
# moves much, and changes which experts are chosen.
FAR = {"int8": 0.3, "int4": 2.0}


def learner_of(policy: Policy) -> Learner:
    options, mtp = LearnerOptions(learning_rate=1e-3), MTPOptions(depth=2)
    return small_learner(policy, options, mtp, LossOptions(), temperature=PARAMS.temperature, sampler_differs=True)


@pytest.fixture(scope="module")
def policy(random_policy) -> Policy:
    return taught(random_policy(17), PARAMS.temperature, steps=4)


@pytest.mark.parametrize("kind", KINDS)
def test_contract_3_drafts_of_a_quantised_sampler_change_no_token(policy, kind):
    engine = Engine(policy, copies=Copies(kind, kind))
    assert assert_lossless(engine, PROMPTS[:4], replace(PARAMS, max_completion_tokens=20), depths=(1, 3)) > 100


@pytest.mark.parametrize("kind", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_contract_3_a_quantised_draft_head_changes_no_token(policy, kind):
    """Nor a log-probability: what is sampled by keeps its precision."""
    params = replace(PARAMS, draft_tokens=2, max_completion_tokens=20)
    plain, drafting = (Engine(policy, copies=copies) for copies in (Copies(), Copies("none", kind)))
    assert drafting.head.logits is not drafting.trunk.logits
    groups = [engine.sample(PROMPTS[:4], params) for engine in (plain, drafting)]
    assert tokens(groups[0]) == tokens(groups[1])
    for one, other in zip(*map(completions, groups), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    logits = [engine.head.logits(torch.eye(policy.config.hidden_size)) for engine in (plain, drafting)]
    assert not torch.equal(*logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_2_log_probabilities_are_those_of_the_quantised_policy(random_policy, kind, dtype):
    """They do not depend on how many rows are decoded together, and are near the learner's, but not equal to them."""
    policy = random_policy(17).cast(dtype)
    params = replace(PARAMS, max_completion_tokens=8, draft_tokens=0, stop_token_ids=())
    engines = [Engine(policy, dtype, max_rows=rows, copies=Copies(kind, kind)) for rows in (1, 64)]
    groups = [engine.sample(PROMPTS[:3], params) for engine in engines]
    if dtype == torch.float32:
        assert tokens(groups[0]) == tokens(groups[1])
        for one, other in zip(*map(completions, groups), strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    scores = logprobs_of_groups(policy, groups[1], params.temperature)
    own = torch.tensor([value for c in completions(groups[1]) for value in c.logprobs])
    learners = torch.tensor([value for group in scores for row in group for value in row])
    assert 1e-3 < (own - learners).abs().mean() < FAR[kind]
    afresh = logprobs_of_trunk(rounded_trunk(policy, kind), groups[1], params.temperature)
    near = (torch.tensor([value for group in afresh for row in group for value in row]) - own).abs()
    assert near.mean() < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_contract_5_each_publication_rounds_anew_and_the_correction_is_on(random_policy, kind):
    learner = learner_of(random_policy(17))
    pool = open_pool(learner.policy, PoolOptions(copies=Copies(kind, kind)))
    weight_sync = WeightSync(pool, learner, replace(PARAMS, draft_tokens=2), kind)
    for version in range(3):
        metrics = weight_sync.sync_weights()
        assert 0 < metrics["sync_check/logprob_abs_mean"] < 1e-5
        fresh = Engine(learner.policy, copies=Copies(kind, kind))
        assert torch.equal(pool.engine.trunk.blocks[1].out.weight, fresh.trunk.blocks[1].out.weight)
        assert torch.equal(pool.engine.trunk.blocks[1].gate_up, fresh.trunk.blocks[1].gate_up)
        groups = pool.sample(PROMPTS[:3], replace(PARAMS, max_completion_tokens=12, draft_tokens=2).at(version))
        marks = [[float(i % 2) for i, _ in enumerate(group.completions)] for group in groups]
        found = learner.step(learner.prepare(groups, [GroupScore(row, {"marks": row}) for row in marks]), version + 1)
        assert last_work(learner).fixed["policy"].correction == "token_truncate"
        assert 1e-3 < found["mismatch/logprob_abs_mean"] < FAR[kind]


def stale_scale(engine: Engine) -> None:
    """From now on its matrices have new codes and the scales of the version before."""
    derive, grid, old = engine._derive, quantized.grid, []

    def recorded(weight, kind):
        old.append(grid(weight, kind))
        return old[-1]

    def wrong() -> None:
        before = iter(list(old))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantized, "grid", lambda weight, kind: (grid(weight, kind)[0], next(before)[1]))
            derive()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "grid", recorded)
        derive()
    engine._derive = wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_contract_13_canaries_catch_a_stale_scale(random_policy, kind, dtype):
    """Where one matrix has grown since the version of the scale; without that the same publication passes."""
    for sabotages in (False, True):
        policy = random_policy(5).cast(dtype)
        pool = open_pool(copy.deepcopy(policy), PoolOptions(dtype=dtype, copies=Copies(kind, kind)))
        weight_sync = WeightSync(pool, learner_of(policy), replace(PARAMS, draft_tokens=2), kind)
        weight_sync.sync_weights()
        if sabotages:
            stale_scale(pool.engine)
        with torch.no_grad():
            policy.trunk.model.layers[0].self_attn.o_proj.weight.mul_(1.01 if dtype == torch.float32 else 1.5)
        weight_sync.learner.policy_version = 1
        if not sabotages:
            assert weight_sync.sync_weights()
            continue
        with pytest.raises(RolloutError, match="the sampler computes other log-probabilities .* version 1: mean"):
            weight_sync.sync_weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract_13_canaries_catch_an_error_of_the_decoder_itself(random_policy, monkeypatch, dtype):
    """Rounded matrices are compared with the same decoder, which would hide it."""
    policy = random_policy(5).cast(dtype)
    pool = open_pool(copy.deepcopy(policy), PoolOptions(dtype=dtype, copies=Copies("int8", "int8")))
    weight_sync = WeightSync(pool, learner_of(policy), replace(PARAMS, draft_tokens=2), "int8")
    assert weight_sync.sync_weights()
    rotate = absorbed.rotate
    monkeypatch.setattr(absorbed, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    weight_sync.learner.policy_version = 1
    with pytest.raises(RolloutError, match="the decoder of the samplers, without rounding, computes other log-prob"):
        weight_sync.sync_weights()


def test_models_of_transformers_are_refused(hf_policy):
    with pytest.raises(ValueError, match="rollout.quantization=int8: transformers' own forward"):
        Engine(hf_policy("qwen2", 5), copies=Copies("int8"))


def test_nothing_else_of_the_engine_is_rounded(random_policy):
    engine = Engine(random_policy(17), copies=Copies("int8", "int8"))
    block = engine.trunk.blocks[1]
    assert (
        kind_of(block.into) == kind_of(block.out) == kind_of(block.dense_down) == kind_of(engine.trunk.logits) == "int8"
    )
    assert not torch.equal(block.gate_up, engine.policy.trunk.model.layers[1].mlp.experts.gate_up_proj)
    assert torch.equal(engine.trunk.embedding, engine.policy.trunk.model.embed_tokens.weight)
    assert torch.equal(block.gate, engine.policy.trunk.model.layers[1].mlp.gate.weight)
