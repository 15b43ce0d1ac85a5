"""Contract 13: a sampler that holds or computes something else than the learner is found at its next publication."""

import copy
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType, SimpleNamespace
from unittest.mock import Mock

import pytest
import ray
import torch

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.run.stop import Stopped, signals
from grpo.steps import quantized
from grpo.steps import weight_sync as module
from grpo.steps.weight_sync import WeightSync
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.pool import Pool, PoolOptions
from rollout.sampling import SamplingParams
from rollout.workers.cluster import start_ray
from rollout.workers.kinds import open_pool
from rollout.workers.local_pool import LocalPool

PARAMS = SamplingParams(group_size=4, temperature=0.8, max_completion_tokens=12, draft_tokens=2)
PROMPTS = [Prompt(f"p/{i}", "", [3 + i, *range(9, 14 + i)]) for i in range(3)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STALE = {
    "embedding": "trunk.model.embed_tokens.weight",
    "output head": "trunk.lm_head.weight",
    "expert": "trunk.model.layers.1.mlp.experts.down_proj",
    "expert bias": "trunk.model.layers.1.mlp.gate.e_score_correction_bias",
    "norm": "trunk.model.layers.0.input_layernorm.weight",
    "draft head": "mtp.eh_proj.weight",
    "tied head": "trunk.lm_head.weight",
    "adapter": "trunk.model.layers.0.self_attn.o_proj.weight",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(2)
    yield
    ray.shutdown()


@pytest.fixture
def policy_of(random_policy, hf_policy) -> Callable[..., Policy]:
    def build(backend: str, dtype: torch.dtype = torch.float32, **config) -> Policy:
        policy = random_policy(5, **config) if backend == "native" else hf_policy("qwen2", 5, **config)
        return policy.cast(dtype)

    return build


def params_of(policy: Policy) -> SamplingParams:
    return replace(PARAMS, draft_tokens=2 if policy.mtp else 0)


def learner_of(policy: Policy) -> Learner:
    from small_learner import small_learner  # workers read this file, too, and do not find that one

    options = LearnerOptions(learning_rate=1e-3)
    return small_learner(policy, options, MTPOptions(depth=2), LossOptions(), temperature=PARAMS.temperature)


def learn(learner: Learner, pool: Pool, step: int = 1) -> None:
    """A step of GRPO, in which the expert bias moves too."""
    groups = pool.sample(PROMPTS, params_of(learner.policy).at(step))
    marks = [[float(i % 2) for i, _ in enumerate(group.completions)] for group in groups]
    learner.step(learner.prepare(groups, [GroupScore(row, {"marks": row}) for row in marks]), step)
    for name, buffer in learner.policy.named_buffers():
        if "correction_bias" in name:
            buffer.add_(1e-3)


# Sabotage of an engine. They run inside Ray workers too, so each has all that it needs.


def keep(engine: Engine, name: str) -> None:
    """From now on one tensor stays what it was."""
    load = engine.policy.load_weights

    def load_others(self: Policy, weights) -> None:
        weights = dict(weights)
        load(weights | {name: self.state_dict()[name].clone().reshape(weights[name].shape)})

    engine.policy.load_weights = MethodType(load_others, engine.policy)


def freeze(engine: Engine) -> None:
    """It takes versions, and no weights."""
    engine.policy.load_weights = lambda weights: None


def derive_no_more(engine: Engine) -> None:
    """It takes weights, and goes on decoding with what it has derived from the first ones."""
    engine._derive = lambda: None


def turn_the_other_way(engine: Engine) -> None:
    """A wrong rope kernel."""
    derive = engine._derive

    def wrong() -> None:
        derive()
        if engine.policy.backend == "native":
            engine.trunk.rope.sin = -engine.trunk.rope.sin
        else:
            decoder = engine.trunk.decoder
            engine.trunk.decoder = lambda input_ids, position_ids, **more: decoder(
                input_ids=input_ids, position_ids=2 * position_ids, **more
            )

    engine._derive = wrong


def sample_hotter(engine: Engine) -> None:
    sample = engine.sample
    engine.sample = lambda prompts, params, *more: sample(
        prompts, replace(params, temperature=1.25 * params.temperature), *more
    )


SABOTAGE = {
    "frozen": (freeze, r"the first tensor that differs is trunk.model.embed_tokens.weight"),
    "not derived": (derive_no_more, r"the first tensor that differs is trunk.model.embed_tokens.weight"),
    "rope": (turn_the_other_way, r"other log-probabilities .* version 1: .* token \d of completion \d of canary/\d"),
    "temperature": (sample_hotter, r"other log-probabilities .* version 1: .* token \d of completion \d of canary/\d"),
}


def refused(learner: Learner, pool: Pool, sabotage: Callable[[], None]) -> str:
    """An honest publication passes; the next one, after `sabotage` and a step, is refused with these words."""
    weight_sync = WeightSync(pool, learner, params_of(learner.policy))
    metrics = weight_sync.sync_weights()
    assert 0 < metrics["sync_check/logprob_abs_mean"] <= metrics["sync_check/logprob_abs_max"]
    learn(learner, pool)
    sabotage()
    with pytest.raises(RolloutError) as error:
        weight_sync.sync_weights()
    return str(error.value)


def in_worker(pool: Pool, sabotage: Callable[[Engine], None]) -> None:
    ray.get(pool.workers.actors[0].__ray_call__.remote(lambda worker: sabotage(worker.engine)))


@pytest.mark.parametrize(("backend", "dtype"), [("native", "fp32"), ("native", "bf16"), ("transformers", "bf16")])
@pytest.mark.parametrize("kind", SABOTAGE)
def test_contract_13_a_sampler_that_is_not_the_learner_is_refused(policy_of, kind, backend, dtype):
    sabotage, words = SABOTAGE[kind]
    policy = policy_of(backend, DTYPES[dtype])
    pool = open_pool(copy.deepcopy(policy), PoolOptions(dtype=DTYPES[dtype]))
    said = refused(learner_of(policy), pool, lambda: sabotage(pool.engine))
    assert said.startswith("the sampler")
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, "native") for kind in STALE] + [(kind, "transformers") for kind in ("embedding", "norm", "tied head")],
)
def test_contract_13_one_stale_tensor_is_named(policy_of, kind, backend):
    policy = policy_of(backend, **({"tie_word_embeddings": True} if kind == "tied head" else {}))
    if kind == "adapter":
        policy.add_lora(2, 4.0, ["o_proj", "experts"])
    pool = open_pool(copy.deepcopy(policy))

    def sabotage() -> None:
        if kind == "tied head":
            untie(pool.engine)
        keep(pool.engine, STALE[kind])

    said = refused(learner_of(policy), pool, sabotage)
    words = "the sampler does not hold what was published as version 1: the first tensor that differs is "
    assert said.startswith(words + STALE[kind]), said


def untie(engine: Engine) -> None:
    """It has two tensors where the policy has one."""
    head = engine.policy.trunk.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


def be_honest(engine: Engine) -> None:
    """It samples and loads again as its class does."""
    for owner, name in ((engine, "sample"), (engine.policy, "load_weights")):
        vars(owner).pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", pytest.param("transformers", marks=pytest.mark.long)])
def test_contract_13_workers_are_refused_by_name(cluster, policy_of, backend):
    """Of two workers one is wrong each time, the last time for good: what it has turned stays so."""
    stale = STALE["norm"]
    pool = open_pool(policy_of(backend), PoolOptions(workers=2))
    try:
        for sabotage, words in [(lambda engine: keep(engine, stale), stale), SABOTAGE["temperature"], SABOTAGE["rope"]]:
            in_worker(pool, be_honest)
            learner = learner_of(policy_of(backend))
            said = refused(learner, pool, lambda sabotage=sabotage: in_worker(pool, sabotage))
            assert said.startswith("worker 0")
            assert re.search(words, said), said
    finally:
        pool.close()


@pytest.fixture
def weight_sync(policy_of) -> WeightSync:
    policy = policy_of("native")
    return WeightSync(open_pool(policy), learner_of(policy), PARAMS)


def test_contract_13_canaries_change_no_token_of_the_run(weight_sync):
    pool = weight_sync.pool
    before = pool.sample(PROMPTS, PARAMS)
    weight_sync.sync_weights()
    assert pool.sample(PROMPTS, PARAMS) == before


def test_canaries_that_fail_once_are_made_again(weight_sync, monkeypatch):
    sample, calls = weight_sync.pool.sample_on_each, []
    tied = weight_sync.prompts[0][0].token_ids

    def flip(prompts, params):
        """An expert takes another's place at a token of one prompt, whatever is sampled after it."""
        sampled = sample(prompts, params)
        calls.append(params.draw)
        for group in sampled["the sampler"]:
            if group.prompt.token_ids == tied:
                group.completions[0].logprobs[3] += 0.2
        return sampled

    monkeypatch.setattr(weight_sync.pool, "sample_on_each", flip)
    metrics = weight_sync.sync_weights()
    assert calls == [0, 1]
    assert metrics["sync_check/repeats"] == 1
    assert metrics["sync_check/logprob_abs_max"] < 1e-4


def test_samplers_get_the_weights_when_these_have_moved_or_when_they_have_let_them_go(weight_sync, monkeypatch):
    """Samplers that have left the learner's GPUs hold no weights, though the version is still the one they had."""
    pool, versions = weight_sync.pool, []
    run = SimpleNamespace(timed=nullcontext, phase=nullcontext, metrics={})
    publish = pool.sync_weights

    def wakes(weights, version) -> None:
        versions.append(version)
        publish(weights, version)
        pool.asleep = False

    monkeypatch.setattr(pool, "sync_weights", wakes)
    weight_sync.keep_up(run)
    weight_sync.keep_up(run)
    assert versions == [0]
    pool.asleep = True
    weight_sync.keep_up(run)
    weight_sync.keep_up(run)
    assert versions == [0, 0]
    weight_sync.keep_up(run, anew=True)
    assert versions == [0, 0, 0]
    learn(weight_sync.learner, pool)
    weight_sync.keep_up(run)
    weight_sync.keep_up(run)
    assert versions == [0, 0, 0, 1]
    assert run.metrics["sync_check/repeats"] == 0


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
def test_contract_13_a_version_that_was_not_admitted_is_published_again(weight_sync, monkeypatch, error):
    weight_sync.sync_weights()
    scores = weight_sync.scores
    run = SimpleNamespace(timed=nullcontext, phase=nullcontext, metrics={})
    weight_sync.keep_up(run)
    assert run.metrics == {}  # they hold it already

    def wrong(sampled, temperature):
        if error:
            raise error
        found = scores(sampled, temperature)
        return {worker: [[[x - 1 for x in row] for row in rows] for rows in found[worker]] for worker in found}

    monkeypatch.setattr(weight_sync, "scores", wrong)
    for anew in (True, False):  # the second time as before the next sampling
        with pytest.raises(RuntimeError if error else RolloutError):
            weight_sync.keep_up(run, anew)
        assert weight_sync.version is None
    monkeypatch.setattr(weight_sync, "scores", scores)
    weight_sync.keep_up(run)
    assert run.metrics["sync_check/repeats"] == weight_sync.version == 0


def test_each_sampler_is_scored_by_its_own_tokens_and_the_same_tokens_once(weight_sync, monkeypatch):
    pool, calls = weight_sync.pool, []

    def score(*given):
        calls.append(given)
        return logprobs_of_groups(*given)

    monkeypatch.setattr(module, "logprobs_of_groups", score)
    first, second = (pool.sample(weight_sync.prompts[0], PARAMS.at(step)) for step in (1, 2))
    sampled = {"one": first, "two": copy.deepcopy(first), "three": second}
    scores = weight_sync.scores(sampled, PARAMS.temperature)
    assert len(calls) == 2
    for sampler, groups in sampled.items():
        for group, rows in zip(groups, scores[sampler], strict=True):
            for completion, row in zip(group.completions, rows, strict=True):
                assert row == pytest.approx(completion.logprobs, abs=1e-4)


@pytest.mark.parametrize("fault", [None, "the sampler has rounded another matrix"])
def test_contract_13_copies_in_few_bits_are_compared_without_rounding_too(policy_of, monkeypatch, fault):
    """Their canaries agree with the learner's copies; what those are copies of is looked at by itself."""
    policy = policy_of("native")
    asked = []

    def looked(*given):
        asked.append(given)
        return fault

    monkeypatch.setattr(quantized, "scorer", lambda policy, copies: partial(logprobs_of_groups, policy))
    monkeypatch.setattr(quantized, "fault_without_rounding", looked)
    learner = learner_of(policy)
    weight_sync = WeightSync(open_pool(policy), learner, params_of(policy), copies="int8")
    if fault is None:
        assert weight_sync.sync_weights()["sync_check/repeats"] == 0
        assert weight_sync.version == 0
    else:
        with pytest.raises(RolloutError, match=fault):
            weight_sync.sync_weights()
        assert weight_sync.version is None
    assert [(given[0] is policy, *given[2:]) for given in asked[:1]] == [(True, 4 * PARAMS.temperature, 0)]


def test_a_publication_that_a_stop_cuts_short_has_no_canaries_and_does_not_undo_the_step(policy_of, monkeypatch):
    """What was learned counts: the step gets its line, and the next sampling is given up."""
    policy = policy_of("native")
    pool = open_pool(policy, PoolOptions(check_stop=signals.check))
    weight_sync = WeightSync(pool, learner_of(policy), PARAMS)
    assert weight_sync.sync_weights()["sync_check/repeats"] == 0
    monkeypatch.setattr(signals, "number", signal.SIGTERM)
    assert weight_sync.sync_weights() == {}
    with pytest.raises(Stopped):
        pool.sample(weight_sync.prompts[0], PARAMS)
    monkeypatch.setattr(pool, "sync_weights", Mock(side_effect=Stopped))
    assert weight_sync.sync_weights() == {}
    assert weight_sync.version == 0


def test_a_context_shorter_than_the_canaries_has_short_ones(policy_of):
    policy = policy_of("native", max_position_embeddings=5)
    metrics = WeightSync(LocalPool(policy), learner_of(policy), PARAMS).sync_weights()
    assert metrics["sync_check/logprob_abs_max"] < 1e-4
