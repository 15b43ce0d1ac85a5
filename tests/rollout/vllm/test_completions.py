"""vLLM's answers as completions: reasons, seeds, and drafts counted as our engine counts them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from policies.presets import small_tokenizer
from rollout.group import Completion, DraftStats, Prompt
from rollout.request import Request
from rollout.sampling import SamplingParams
from rollout.vllm.completions import Row, draft_stats, seed_of
from rollout.vllm.relay import VLLMRelay

TOKENIZER = small_tokenizer(["two and three is five"])


def row(**given) -> dict:
    return {"ids": [5, 6, 2], "logprobs": [-1.0, -2.0, -0.5], "reason": "stop", "drafted": [], "accepted": []} | given


def completion(found: dict) -> Completion:
    made = Row(Prompt("a", "", [9]), 0, 0)
    made.add(found)
    return made.completion(TOKENIZER, 7, 1.0)


def test_a_stop_token_ends_the_ids_and_not_the_text():
    stopped, cut = (completion(row(reason=reason)) for reason in ("stop", "length"))
    assert (stopped.token_ids, stopped.finish_reason, stopped.policy_version) == ([5, 6, 2], "stop", 7)
    assert stopped.text == TOKENIZER.decode([5, 6])
    assert (cut.finish_reason, cut.text) == ("length", TOKENIZER.decode([5, 6, 2]))
    assert stopped.draft == DraftStats(2, depths=[0, 0, 0])


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None])
def test_a_logprob_that_is_no_number_aborts(bad):
    assert completion(row(logprobs=[-1.0, bad, -0.5])).finish_reason == "abort"


def test_drafts_of_agents_requests_are_counted():
    """Without them a run of agents would look as if no draft was ever made."""
    pool = SimpleNamespace(
        policy=SimpleNamespace(tokenizer=TOKENIZER, max_length=64), context=64, settings=SimpleNamespace(draft_tokens=2)
    )
    relay = VLLMRelay(pool, 7, SamplingParams(draft_tokens=2), 8)
    relay.requests[0] = Request(Prompt("a", "", [9]), SamplingParams(draft_tokens=2), lambda _: None)
    made = relay._completion(0, row(drafted=[2], accepted=[1]) | {"cached": 3})
    assert made.draft == DraftStats(1, [1, 1], [1, 0], depths=[0, 1, 0])
    assert (made.cached, made.policy_version) == (3, 7)


def test_two_turns_are_one_completion():
    """What tools wrote has no log-probability and no forward, and the second turn has noise and room of its own."""
    params = SamplingParams(max_completion_tokens=20, seed=3)
    made = Row(Prompt("a", "", [9, 8]), 1, 2)
    assert made.request(params) == [[9, 8], seed_of(params, "a", 1), 20]
    made.add(row(drafted=[2], accepted=[1]))
    made.write([40, 41])
    ids, seed, most = made.request(params)
    assert (ids, most) == ([9, 8, 5, 6, 2, 40, 41], 15)
    assert seed == seed_of(params, "a", 1, at=5) != seed_of(params, "a", 1)
    assert 0 <= seed < 1 << 63
    made.add(row(ids=[7, 7, 7, 7], logprobs=[-0.1] * 4, reason="length", drafted=[2, 2], accepted=[2, 0]))
    whole = made.completion(TOKENIZER, 4, 1.0)
    assert whole.token_ids == [5, 6, 2, 40, 41, 7, 7, 7, 7]
    assert whole.logprobs == [-1.0, -2.0, -0.5, 0.0, 0.0, -0.1, -0.1, -0.1, -0.1]
    assert (whole.finish_reason, whole.policy_version) == ("length", 4)
    assert whole.draft == DraftStats(2, [2, 2], [2, 1], depths=[0, 1, 0, 0, 0, 0, 1, 2, 0])


def test_the_seed_counts_from_the_first_sample_and_from_the_start_of_the_completion():
    """As the noise of our own engine does: a request for the fourth sample is that of a group's fourth."""
    params = SamplingParams(max_completion_tokens=20, seed=3)
    fourth = Row(Prompt("a", "", [9]), 3, 0).request(params)
    assert Row(Prompt("a", "", [9], first_sample=3), 0, 0).request(params) == fourth
    assert Row(Prompt("a", "", [9]), 3, 0).request(replace(params, start=5))[1] == seed_of(params, "a", 3, at=5)


@pytest.mark.parametrize(
    ("drafted", "accepted", "tokens", "expected"),
    [
        ([], [], 1, DraftStats(0, [0, 0], [0, 0], depths=[0])),
        ([2, 2], [2, 1], 6, DraftStats(2, [2, 2], [2, 1], depths=[0, 1, 2, 0, 1, 0])),
        ([2, 2], [0, 2], 3, DraftStats(2, [2, 2], [1, 0], depths=[0, 0, 1])),  # it ends inside the second forward
        ([2, 1], [2, 1], 5, DraftStats(2, [2, 1], [2, 1], depths=[0, 1, 2, 0, 1])),
        ([2, 2], [2, 2], 4, DraftStats(1, [1, 1], [1, 1], depths=[0, 1, 2, 0])),
    ],
)
def test_drafts_are_counted_as_our_engine_counts_them(drafted, accepted, tokens, expected):
    assert draft_stats(drafted, accepted, tokens, 2) == expected


def test_seeds_are_keyed_by_run_step_draw_prompt_and_sample():
    params = SamplingParams(seed=3, step=2)
    seeds = {
        seed_of(given, prompt, sample)
        for given in (params, params.at(3), params.at(2, 1), SamplingParams(seed=4, step=2))
        for prompt in ("a", "b")
        for sample in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 1 << 63 for seed in seeds)  # what vLLM's generators take
    assert seed_of(params, "a", 1) in seeds
