"""vLLM's answers as completions: reasons, seeds, and drafts counted as our engine counts them."""

import math

import pytest

from policies.presets import small_tokenizer
from rollout.backends.vllm.completions import completion_of, draft_stats, seed_of
from rollout.group import DraftStats
from rollout.sampling import SamplingParams

TOKENIZER = small_tokenizer(["two and three is five"])


def row(**given) -> dict:
    return {"ids": [5, 6, 2], "logprobs": [-1.0, -2.0, -0.5], "reason": "stop", "drafted": [], "accepted": []} | given


def test_a_stop_token_ends_the_ids_and_not_the_text():
    stopped, cut = (completion_of(row(reason=reason), TOKENIZER, 7, 0) for reason in ("stop", "length"))
    assert (stopped.token_ids, stopped.finish_reason, stopped.policy_version) == ([5, 6, 2], "stop", 7)
    assert stopped.text == TOKENIZER.decode([5, 6])
    assert (cut.finish_reason, cut.text) == ("length", TOKENIZER.decode([5, 6, 2]))
    assert stopped.draft == DraftStats(2, depths=[0, 0, 0])


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None])
def test_a_logprob_that_is_no_number_aborts(bad):
    assert completion_of(row(logprobs=[-1.0, bad, -0.5]), TOKENIZER, 0, 0).finish_reason == "abort"


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
