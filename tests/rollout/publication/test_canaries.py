"""What canaries let through and what they name, on numbers made by hand."""

import random

import pytest
import torch

from rollout.group import Completion, Prompt, RolloutGroup
from rollout.publication.canaries import compare, other_canaries


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


def test_a_number_that_is_none_is_refused():
    groups, scores = canaries(0.2, 1.0, 0.0)
    groups["worker 1"][0].completions[0].logprobs[3] = float("nan")
    assert "token 3 of completion 0 of canary/0" in compare(groups, scores, 7, torch.bfloat16).fault


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
    assert other_canaries(others, passed, torch.bfloat16) is None
    others[2].completions[0].logprobs[3] = float("nan")
    assert "samples other canaries" in other_canaries(others, passed, torch.bfloat16)
