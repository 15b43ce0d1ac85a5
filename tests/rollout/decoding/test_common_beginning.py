"""A system prompt that all prompts of a shard begin with is read once, and no token changes by that."""

from dataclasses import replace

import pytest
import torch
from engine_cases import PARAMS, PROMPTS, completions, prompts_of, tokens

from policies.decoding.absorbed import AbsorbedTrunk
from rollout.decoding import common_beginning
from rollout.decoding.batch import Batch
from rollout.decoding.common_beginning import SHARED, beginning_of
from rollout.decoding.engine import Engine
from rollout.request import Request
from rollout.requests.serving import Serving

SYSTEM = prompts_of(140, seed=7)[0].token_ids
ALIKE = [replace(prompt, token_ids=[*SYSTEM, *prompt.token_ids]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine(taught_policy):
    return Engine(taught_policy())


@pytest.fixture
def read(monkeypatch):
    """The numbers of tokens, with padding, of each forward of the trunk."""
    counts, forward = [], AbsorbedTrunk.__call__

    def count(trunk, token_ids, positions, cache):
        counts.append(token_ids.numel())
        return forward(trunk, token_ids, positions, cache)

    monkeypatch.setattr(AbsorbedTrunk, "__call__", count)
    return counts


def test_tokens_that_are_prefilled_by_hand(engine, read, monkeypatch):
    """Eight prompts of 141 to 170 tokens: four of them and then four, with padding; or 140 tokens once, and what comes
    after them in all prompts, at most 30 tokens, in one forward."""
    with torch.inference_mode():
        Batch(engine.decoder, ALIKE, PARAMS).admit_waiting()
        assert read == [140, 8 * 30]
        read.clear()
        monkeypatch.setattr(common_beginning, "SHARED", 141)
        Batch(engine.decoder, ALIKE, PARAMS).admit_waiting()
    assert read == [4 * 170, 4 * 144]


@pytest.mark.parametrize(
    "given", [{}, {"draft_tokens": 2}, pytest.param({"group_size": 1, "draft_tokens": 1}, marks=pytest.mark.slow)]
)
def test_contract_4_prompts_that_begin_alike_change_no_token(engine, monkeypatch, given):
    """Also where the rows are few, so that prompts are admitted later."""
    small, params = Engine(engine.policy, max_rows=12), replace(PARAMS, **given)
    shared = small.sample(ALIKE, params)
    monkeypatch.setattr(common_beginning, "SHARED", 1000)
    apart = small.sample(ALIKE, params)
    assert tokens(shared) == tokens(apart)
    for one, other in zip(completions(shared), completions(apart), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("qwen3", {}),
        ("mistral", {"sliding_window": 60}),
        pytest.param("gemma2", {"sliding_window": 24}, marks=pytest.mark.slow),
    ],
)
def test_contract_4_models_of_transformers_share_it_too(hf_policy, monkeypatch, kind, given):
    """Also where windows slide over the end of it, and where scores are capped."""
    engine, params = Engine(hf_policy(kind, 2, max_position_embeddings=512, **given)), replace(PARAMS, group_size=2)
    with torch.inference_mode():
        assert beginning_of(engine.decoder, ALIKE, params).length == 140
    shared = engine.sample(ALIKE[:4], params)
    monkeypatch.setattr(common_beginning, "SHARED", 1000)
    apart = engine.sample(ALIKE[:4], params)
    assert tokens(shared) == tokens(apart)
    for one, other in zip(completions(shared), completions(apart), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_requests_that_join_together_share_what_they_begin_with(engine, read):
    """Four of one prompt and four of others, as the first turns of forks."""
    serving, told = Serving(engine.decoder, replace(PARAMS, group_size=1)), {}
    for number, prompt in enumerate([*[ALIKE[0]] * 4, *ALIKE[1:5]]):
        request = replace(prompt, first_sample=number)
        serving.add(Request(request, serving.params, lambda news, number=number: told.update({number: news})))
    with torch.inference_mode():
        serving.round()
        assert read[0] == 140
        assert read[1] == 8 * 17
        while serving.busy:
            serving.round()
    assert all(news.completion is not None for news in told.values())


def test_what_cannot_share_reads_every_prompt_whole(engine):
    decoder, few = (
        engine.decoder,
        [replace(prompt, token_ids=SYSTEM[: SHARED - 1] + prompt.token_ids) for prompt in PROMPTS],
    )
    with torch.inference_mode():
        assert beginning_of(decoder, ALIKE, PARAMS).length == 140
        same = beginning_of(decoder, [ALIKE[1]] * 2, PARAMS)
        assert same.length == 140  # its last token is left to be read
        assert beginning_of(decoder, ALIKE[:1], PARAMS) is None
        assert beginning_of(decoder, few, PARAMS) is None
        assert beginning_of(decoder, ALIKE, replace(PARAMS, record_routing=True)) is None
        assert beginning_of(replace(decoder, trunk=object()), ALIKE, PARAMS) is None
