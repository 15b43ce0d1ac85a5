"""A real vLLM of its own environment (`make vllm`): its log-probabilities are the learner's; each bypass is needed."""

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import completions, enumerated, prompts_of, tokens
from frequencies import z_score
from talking import Talking
from vllm_cases import HEADS, PYTHON, needs_vllm

from grpo.learner.likelihood import logprobs_of_groups
from grpo.run.stop import Stopped
from grpo.train import train
from policies.policy import Policy
from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.pool import PoolOptions
from rollout.sampling import EnvironmentSpec, SamplingParams
from rollout.vllm.pool import VLLMPool
from rollout.vllm.process import VLLMProcess
from rollout.vllm.settings import VLLMSettings

pytestmark = needs_vllm
PROMPTS = prompts_of(9, 1, 17, 4, 30, 11)
PARAMS = SamplingParams(3, 0.7, 24, tuple(range(7, 280, 15)), seed=5, step=2, draft_tokens=2)
GUESSING = Path(__file__).parents[2] / "cases/guessing.py"
EXACT = 1e-4  # nats, in float32; a fault moves log-probabilities by far more


def worst_gap(policy: Policy, pool: VLLMPool, params: SamplingParams) -> float:
    groups = pool.sample(PROMPTS, params)
    scores = logprobs_of_groups(policy, groups, params.temperature or 1.0)
    gaps = [
        abs(own - score)
        for group, by_completion in zip(groups, scores, strict=True)
        for completion, of_learner in zip(group.completions, by_completion, strict=True)
        for own, score in zip(completion.logprobs, of_learner, strict=True)
    ]
    assert len(gaps) > 100
    return max(gaps)


def is_wrong(policy: Policy, settings: VLLMSettings) -> bool:
    """Some shapes are refused where the experts are left unpacked, and temperatures never written may give NaN."""
    try:
        pool = VLLMPool(policy, PoolOptions(vllm=settings))
    except RolloutError as error:
        return "size of tensor" in str(error)
    try:
        pool.sync_weights(moved(policy).synced_weights(), 1)
        return worst_gap(policy, pool, replace(PARAMS, draft_tokens=settings.draft_tokens)) > 100 * EXACT
    except RolloutError as error:
        return "not finite" in str(error)
    finally:
        pool.close()


def moved(policy: Policy) -> Policy:
    """As an optimizer would: every tensor that is published."""
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(0.2 * tensor.std(correction=0) * torch.randn_like(tensor))
    return policy


@pytest.fixture(scope="module")
def policy(random_policy) -> Policy:
    return random_policy(11, **HEADS)


@pytest.fixture(scope="module")
def pool(policy, tmp_path_factory) -> Iterator[VLLMPool]:
    settings = VLLMSettings(python=PYTHON, draft_tokens=2, log=tmp_path_factory.mktemp("vllm") / "vllm.log")
    pool = VLLMPool(policy, PoolOptions(vllm=settings))
    yield pool
    pool.close()


def test_logprobs_are_the_learners_after_every_publication(policy, pool):
    """And those of the version before no longer are: weights are new each time."""
    for version in (1, 2):
        moved(policy)
        if version == 2:
            assert worst_gap(policy, pool, PARAMS) > 100 * EXACT
        pool.sync_weights(policy.synced_weights(), version)
        for temperature in (0.7, 1.0, 0.0, 4.0):
            assert worst_gap(policy, pool, replace(PARAMS, temperature=temperature)) < EXACT
    assert pool.metrics()["sync/bytes"] > 0
    assert {c.policy_version for c in completions(pool.sample(PROMPTS, PARAMS))} == {2}


def test_adapters_travel_alone_and_are_merged_there(random_policy, pool):
    """Of a policy of the same shape, so that this vLLM serves it: linear layers, experts and the draft head."""
    policy = random_policy(18, **HEADS)
    policy.add_lora(2, 4.0, ["q_proj", "o_proj", "gate_proj", "experts", "mtp"])
    settings = VLLMSettings(url=pool.client.url, token=pool.client.token, draft_tokens=2)
    other = VLLMPool(policy, PoolOptions(vllm=settings))
    whole = other.metrics()["sync/bytes"]
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        assert worst_gap(policy, other, PARAMS) > 100 * EXACT
        other.sync_weights(policy.synced_weights(), version)
        assert worst_gap(policy, other, PARAMS) < EXACT
    assert 0 < other.metrics()["sync/bytes"] / 2 < whole / 3
    pool.sync_weights(pool.policy.synced_weights(), 3)  # everything, by another trainer
    with pytest.raises(RolloutError, match="does not hold the weights under these adapters"):
        other.sync_weights(policy.synced_weights(), 4)
    other.sync_weights(policy.synced_weights(), 5)
    assert worst_gap(policy, other, PARAMS) < EXACT
    pool.sync_weights(pool.policy.synced_weights(), 6)


def test_the_same_request_gives_the_same_bits_whatever_came_between(pool):
    first = pool.sample(PROMPTS, PARAMS)
    pool.sample(PROMPTS[::-1], replace(PARAMS, temperature=1.0))
    assert pool.sample(PROMPTS, PARAMS) == first
    assert pool.sample_on_each(PROMPTS, PARAMS) == {"vLLM": first}
    for other in (PARAMS.at(3), PARAMS.at(2, 1), replace(PARAMS, seed=6)):
        assert tokens(pool.sample(PROMPTS, other)) != tokens(first)
    assert len({tuple(ids) for ids in tokens(first)}) > len(PROMPTS)  # the completions of a group differ


def test_episodes_are_scored_as_the_learner_scores_them_and_read_their_turns_once(policy, tmp_path, monkeypatch):
    """Several turns, with drafts: what was read in the turns before comes from the prefix cache, by whole blocks."""
    monkeypatch.setattr("rollout.environments.episodes.TurnFormat", Talking)
    spec = EnvironmentSpec(environments=(("", f"{GUESSING}:Guess"),), max_turns=5)
    more = {"group_size": 2 * PARAMS.group_size, "max_completion_tokens": 130}
    params = replace(PARAMS, stop_token_ids=tuple(range(7, 280, 11)), environment=spec, **more)
    prompts = [replace(prompt, text="how many apples are left? " * 20 + str(i)) for i, prompt in enumerate(PROMPTS)]
    settings = VLLMSettings(python=PYTHON, draft_tokens=2, log=tmp_path / "vllm.log", engine={"block_size": 32})
    pool, told = VLLMPool(moved(policy), PoolOptions(vllm=settings)), []
    post = pool.client.post

    def spied(path: str, what: dict, **limits: float) -> Iterator[dict]:
        for answer in post(path, what, **limits):
            yield answer
        told.append((sum(len(ids) for ids, _, _ in what["rows"]), answer["cached"]))

    monkeypatch.setattr(pool.client, "post", spied)
    try:
        groups = pool.sample(prompts, params)
        turns, told[:] = list(told), []
        assert pool.sample(prompts, params) == groups
        assert told == turns
    finally:
        pool.close()
    made = completions(groups)
    assert {c.finish_reason for c in made} >= {"stop", "max_turns"}
    assert sum(len(c.token_ids) - c.num_sampled for c in made) > 200
    assert len({tuple(c.token_ids) for c in made}) > 0.9 * len(made)
    scores = [score for of_group in logprobs_of_groups(policy, groups, params.temperature) for score in of_group]
    for c, of_learner in zip(made, scores, strict=True):
        assert c.tools is not None
        assert c.tools.failure is None
        for own, score, sampled in zip(c.logprobs, of_learner, c.sampled, strict=True):
            assert abs(own - score) < EXACT if sampled else own == 0
    (_, first), *later = turns
    assert len(later) == 4
    read, cached = (sum(numbers) for numbers in zip(*later, strict=True))
    assert cached > 0.6 * read, (read, cached, first)


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_tokens_are_drawn_as_the_policy_says(random_policy, tmp_path, draft_tokens):
    """Log-probabilities do not show it. With drafts as without."""
    policy = random_policy(16, vocab_size=6, **HEADS)
    settings = VLLMSettings(python=PYTHON, draft_tokens=draft_tokens, log=tmp_path / "vllm.log")
    params = SamplingParams(4000, 0.8, 3, (2,), seed=1, draft_tokens=draft_tokens)
    pool = VLLMPool(policy, PoolOptions(vllm=settings))
    try:
        [group] = pool.sample([Prompt("toy", "", [3, 4])], params)
    finally:
        pool.close()
    counts = Counter(tuple(completion.token_ids) for completion in group.completions)
    assert abs(z_score(counts, enumerated(policy, [3, 4], 0.8, length=3, stop=2))) < 4
    drafted = sum(sum(completion.draft.drafted) for completion in group.completions)
    assert (drafted > 1000) == bool(draft_tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens=0: this vLLM was started with rollout.draft_tokens=2"),
        ({"record_routing": True}, "routing_replay"),
        ({"accept": "margin"}, "margin is our own engine's"),
        ({"stop_strings": ("\n",)}, "stop tokens alone"),
        ({"stop_token_ids": (9999,)}, "9999 is outside the vocabulary"),
    ],
)
def test_what_it_cannot_sample_with_is_named(pool, given, message):
    with pytest.raises((RolloutError, ValueError), match=message):
        pool.sample(PROMPTS, replace(PARAMS, **given))


@pytest.mark.parametrize("bypass", ["rotary", "drafts", "experts", "head"])
def test_a_bypass_is_still_needed(random_policy, tmp_path, bypass):
    """Where this fails, vLLM has mended the fault: remove the bypass, once its oldest supported version has."""
    tied = bypass == "head"
    policy = random_policy(12, mtp=not tied, tie_word_embeddings=tied, **HEADS)
    settings = VLLMSettings(python=PYTHON, draft_tokens=0 if tied else 2, log=tmp_path / "vllm.log", without=[bypass])
    assert is_wrong(policy, settings)


def test_an_existing_server_and_what_it_refuses(random_policy, tmp_path):
    """It takes the model from the first trainer, serves the next one with the same, and no other."""
    policy = random_policy(13, mtp=False, tie_word_embeddings=True, **HEADS)
    process = VLLMProcess(PYTHON, tmp_path / "vllm.log", 1, lambda: None)
    settings = VLLMSettings(url=process.url, token=process.token)
    params = replace(PARAMS, draft_tokens=0)
    try:
        for _ in range(2):
            pool = VLLMPool(policy, PoolOptions(vllm=settings))
            assert worst_gap(moved(policy), pool, params) > EXACT
            pool.sync_weights(policy.synced_weights(), 1)
            assert worst_gap(policy, pool, params) < EXACT
            pool.close()
        assert process.process.poll() is None  # it is not ours to end
        with pytest.raises(RolloutError, match="it holds another model"):
            VLLMPool(random_policy(13, mtp=False, **HEADS), PoolOptions(vllm=settings))
        with pytest.raises(RolloutError, match="refuses our token"):
            VLLMPool(policy, PoolOptions(vllm=replace(settings, token="another token")))
        os.killpg(process.process.pid, signal.SIGKILL)
        with pytest.raises(RolloutError, match="is lost.*start it again at the address in rollout.vllm.url"):
            pool.sample(PROMPTS, params)
    finally:
        process.close()


def test_a_run_trains_is_logged_resumes_to_the_same_bits_and_leaves_no_process(micro_config, micro_preset, tmp_path):
    from policies.presets import PRESETS

    kept = dict(PRESETS[micro_preset])
    PRESETS[micro_preset].update(HEADS)
    try:
        given = {"rollout.backend": "vllm", "steps": 2}
        whole = train(micro_config(tmp_path / "whole", **given))
        with pytest.raises(Stopped):
            train(micro_config(tmp_path / "parts", **given), stop_after=1)
        parts = train(micro_config(tmp_path / "parts", **given), resume="auto")
    finally:
        PRESETS[micro_preset].clear()
        PRESETS[micro_preset].update(kept)
    for line in whole.metrics:
        assert 0 < line["mismatch/logprob_abs_mean"] < 1e-5
        assert 0 < line["sync_check/logprob_abs_max"] < EXACT
    a, b = (result.policy.state_dict() for result in (whole, parts))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    events = [json.loads(line) for line in (tmp_path / "whole/events.jsonl").read_text().splitlines()]
    [noise] = [event for event in events if event["event"] == "keyed_noise"]
    assert noise["available"] is False
    [used] = [event for event in events if event["event"] == "vllm"]
    assert used["version"].startswith("0.")
    assert "vLLM" in (tmp_path / "whole/vllm.log").read_text()
