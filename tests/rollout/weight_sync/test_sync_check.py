"""What canaries let through and what they name, on numbers made by hand."""

import random
from dataclasses import replace

import pytest
import torch

from rollout.group import Completion, Prompt, RolloutGroup
from rollout.sampling import SamplingParams
from rollout.weight_sync.sync_check import (
    COMPLETIONS,
    DRAFTS,
    HOTTER,
    PROMPT_TOKENS,
    PROMPTS,
    TOKENS,
    compare,
    sync_check_difference,
    sync_check_params,
    sync_check_prompts,
)


def canaries(spread: float, slope: float, noise: float) -> tuple[dict, dict]:
    """48 tokens: the learner's log-probabilities have this spread, the sampler's are a line through them and noise."""
    chance = random.Random(0)
    learner = [[-3 + spread * chance.gauss(0, 1) for _ in range(8)] for _ in range(6)]
    own = [[-3 + slope * (value + 3) + noise * chance.gauss(0, 1) for value in row] for row in learner]
    groups, scores = [], []
    for i in range(3):
        rows = range(2 * i, 2 * i + 2)
        completions = [Completion(list(range(8)), own[row], "", "length", 0) for row in rows]
        groups.append(RolloutGroup(Prompt(f"canary/{i}", "", [1]), completions))
        scores.append([learner[row] for row in rows])
    return {"worker 1": groups}, {"worker 1": scores}


@pytest.mark.parametrize(
    ("spread", "noise", "dtype"),
    [
        (1.1, 0.035, torch.bfloat16),  # SmolLM2 in its MLA form at T = 0.7: a mean difference of .028
        (0.19, 0.013, torch.bfloat16),  # the demo, at its worst
        (0.01, 0.005, torch.bfloat16),  # a policy that is sure of everything
        (0.19, 3e-7, torch.float32),
    ],
)
def test_rounding_alone_is_let_through(spread, noise, dtype):
    assert compare(*canaries(spread, 1.0, noise), 7, dtype).fault is None


@pytest.mark.parametrize("hotter", [0.9, 1.1])
@pytest.mark.parametrize(("spread", "noise"), [(1.1, 0.035), (0.19, 0.006)])
def test_contract_13_a_temperature_that_is_wrong_by_a_tenth_is_named_in_bf16(spread, noise, hotter):
    fault = compare(*canaries(spread, 1 / hotter, noise), 7, torch.bfloat16).fault
    assert fault.startswith("worker 1 samples version 7 at another temperature than the learner: its log-probabilities")
    said = float(fault.split("are those of ")[1].split(" times")[0])
    assert said == pytest.approx(hotter, abs=0.03)


@pytest.mark.parametrize(("noise", "dtype"), [(0.5, torch.bfloat16), (1e-3, torch.float32)])
def test_contract_13_noise_beyond_rounding_is_refused_with_the_first_token(noise, dtype):
    fault = compare(*canaries(1.0, 1.0, noise), 7, dtype).fault
    assert fault.startswith(
        "worker 1 computes other log-probabilities than the learner with version 7: mean difference"
    )
    assert "The first token that differs is token" in fault


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", [float("nan"), float("-inf"), float("inf")])
def test_contract_13_a_learner_whose_score_is_no_number_is_refused_at_that_token(score, dtype):
    groups, scores = canaries(0.2, 1.0, 0.0)
    scores["worker 1"][1][1][5] = score
    agreement = compare(groups, scores, 7, dtype)
    assert "The first token that differs is token 5 of completion 1 of canary/1" in agreement.fault
    assert agreement.most == float("inf")
    scores["worker 1"] = [[[score] * 8 for _ in rows] for rows in scores["worker 1"]]
    assert "token 0 of completion 0 of canary/0" in compare(groups, scores, 7, dtype).fault


def test_a_new_worker_whose_canaries_are_no_numbers_is_refused():
    passed, others = (canaries(0.2, 1.0, 0.0)[0]["worker 1"] for _ in range(2))
    assert sync_check_difference(others, passed, torch.bfloat16) is None
    others[2].completions[0].logprobs[3] = float("nan")
    assert "samples other canaries" in sync_check_difference(others, passed, torch.bfloat16)


def test_canaries_are_sampled_like_the_run_but_hotter_short_and_to_the_end():
    run = SamplingParams(
        group_size=8,
        temperature=0.7,
        max_completion_tokens=500,
        stop_token_ids=(2,),
        stop_strings=("x",),
        draft_tokens=None,
        record_routing=True,
        seed=3,
        step=4,
        draw=1,
    )
    params = sync_check_params(run, 1000)
    assert params == replace(
        run,
        group_size=COMPLETIONS,
        temperature=pytest.approx(HOTTER * 0.7),
        max_completion_tokens=TOKENS,
        stop_token_ids=(),
        stop_strings=(),
        draft_tokens=DRAFTS,
        record_routing=False,
    )
    assert [sync_check_params(replace(run, draft_tokens=k), 1000).draft_tokens for k in (0, 3)] == [0, 3]
    assert [sync_check_params(run, context).max_completion_tokens for context in (1, 5, 2 * TOKENS)] == [1, 3, TOKENS]


def test_prompts_of_canaries_fill_half_of_a_short_context_with_tokens_from_everywhere():
    prompts = sync_check_prompts(50_000, 1000)
    ids = [token for prompt in prompts for token in prompt.token_ids]
    assert (len(prompts), {len(prompt.token_ids) for prompt in prompts}) == (PROMPTS, {PROMPT_TOKENS})
    assert len(set(ids)) == len(ids)
    assert min(ids) < 10_000 < 40_000 < max(ids) < 50_000
    assert sync_check_prompts(50_000, 1000) == prompts
    assert max(token for prompt in sync_check_prompts(7, 1000) for token in prompt.token_ids) < 7
    assert [len(sync_check_prompts(300, context)[0].token_ids) for context in (1, 2, 5, 6)] == [1, 1, 2, 3]


@pytest.mark.parametrize("faulty", ["worker 1", "worker 2"])
def test_contract_13_one_faulty_worker_of_two_is_named_whichever_comes_first(faulty):
    groups, scores = canaries(1.0, 1.0, 1e-5)
    more, others = canaries(1.0, 1.0, 0.1)
    right = "worker 2" if faulty == "worker 1" else "worker 1"
    sampled = {faulty: more["worker 1"], right: groups["worker 1"]}
    of_learner = {faulty: others["worker 1"], right: scores["worker 1"]}
    order = ["worker 1", "worker 2"]
    agreement = compare({w: sampled[w] for w in order}, {w: of_learner[w] for w in order}, 7, torch.float32)
    assert agreement.fault.startswith(f"{faulty} computes other log-probabilities")
    alone = compare({faulty: sampled[faulty]}, {faulty: of_learner[faulty]}, 7, torch.float32)
    assert (agreement.mean, agreement.most) == (alone.mean, alone.most)
    honest = compare({right: sampled[right]}, {right: of_learner[right]}, 7, torch.float32)
    assert honest.fault is None
    assert 0 < honest.mean < honest.most < alone.most


def test_contract_13_a_difference_that_no_token_shows_alone_is_refused_by_its_mean():
    groups, scores = canaries(1.0, 1.0, 0.0)
    for group in groups["worker 1"]:
        for completion in group.completions:
            completion.logprobs[:] = [value + 1e-3 for value in completion.logprobs]
    agreement = compare(groups, scores, 7, torch.float32)
    assert agreement.mean == pytest.approx(1e-3) == agreement.most
    assert "token 0 of completion 0 of canary/0" in agreement.fault


def test_a_new_worker_may_part_late_at_a_tie_and_not_early():
    """Up to there their log-probabilities are compared, and no further: they are of different texts then."""

    def parted(at: int, change: float = 0.0, place: int = 0) -> str | None:
        passed, others = (canaries(0.2, 1.0, 0.0)[0]["worker 1"] for _ in range(2))
        for group in others:
            for completion in group.completions:
                completion.token_ids[at:] = [token + 100 for token in completion.token_ids[at:]]
                completion.logprobs[place] += change
        return sync_check_difference(others, passed, torch.float32)

    assert parted(8) is parted(5) is parted(4) is None
    assert parted(3) == "samples other canaries than those before it: 18 of 48 tokens, 0 nats apart"
    assert parted(5, -0.1, place=5) is None
    assert "30 of 48 tokens, 0.1 nats apart" in parted(5, -0.1, place=4)
    assert parted(8, 4e-4) is None
    assert "0.001 nats apart" in parted(8, 1e-3)
