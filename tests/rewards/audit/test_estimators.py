"""Advantages of every estimator that trainers ship draw no finding, and what is wrong beside them is still found."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, pstdev, stdev

import pytest

from rewards.audit.traces import Trace
from tests.rewards.audit.rollouts import honest
from tests.rewards.audit.test_detectors import SIZE, found

STEP = 4 * SIZE  # rollouts
Estimator = Callable[[list[Trace]], list[float]]


def rewards_of(traces: list[Trace]) -> list[float]:
    return [trace.value for trace in traces]


def centred(traces: list[Trace]) -> list[float]:
    rewards = rewards_of(traces)
    return [reward - fmean(rewards) for reward in rewards]


def rloo(group: list[Trace]) -> list[float]:
    rewards = rewards_of(group)
    return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]


def reinforce_plus_plus(step: list[Trace]) -> list[float]:
    deviation = stdev(rewards_of(step))
    return [value / (deviation + 1e-8) for value in centred(step)]


def of_groups(traces: list[Trace], estimator: Estimator) -> list[float]:
    values: list[float] = []
    for start in range(0, len(traces), SIZE):
        values += estimator(traces[start : start + SIZE])
    return values


def reinforce_plus_plus_baseline(step: list[Trace]) -> list[float]:
    values = of_groups(step, centred)
    return [value / (stdev(values) + 1e-8) for value in values]


def opo(group: list[Trace]) -> list[float]:
    lengths = [len(trace.token_ids) for trace in group]
    weighed = sum(length * trace.value for length, trace in zip(lengths, group, strict=True))
    return [trace.value - weighed / sum(lengths) for trace in group]


def remax(group: list[Trace]) -> list[float]:
    """The greedy rollout gets what the first one of the group gets."""
    return [trace.value - group[0].value for trace in group]


def pass_at_k(group: list[Trace]) -> list[float]:
    rewards = rewards_of(group)
    best, second = sorted(rewards, reverse=True)[:2]
    first = rewards.index(best)
    return [best - second if place == first else 0.0 for place in range(len(group))]


def normalized_apart(group: list[Trace]) -> list[float]:
    added = [0.0] * len(group)
    for name, weight in group[0].weights.items():
        values = [trace.parts[name] or 0.0 for trace in group]
        for place, value in enumerate(values):
            added[place] += (weight or 0.0) * (value - fmean(values)) / (stdev(values) + 1e-4)
    return added


def normalized_apart_and_whitened(step: list[Trace]) -> list[float]:
    values = of_groups(step, normalized_apart)
    return [(value - fmean(values)) / (pstdev(values) + 1e-4) for value in values]


def by_rank(group: list[Trace]) -> list[float]:
    rewards = rewards_of(group)
    ranks = [sum(other < reward for other in rewards) + rewards.count(reward) / 2 for reward in rewards]
    return [rank - fmean(ranks) for rank in ranks]


ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "rloo": (rloo, SIZE),
    "reinforce_plus_plus": (reinforce_plus_plus, STEP),
    "reinforce_plus_plus_baseline": (reinforce_plus_plus_baseline, STEP),
    "opo": (opo, SIZE),
    "remax": (remax, SIZE),
    "grpo_passk": (pass_at_k, SIZE),
    "gpg": (centred, SIZE),
    "normalize_then_sum": (normalized_apart, SIZE),
    "normalize_then_sum, whitened": (normalized_apart_and_whitened, STEP),
    "by rank": (by_rank, SIZE),
}


def estimated(name: str, seed: int) -> list[Trace]:
    traces = honest(seed)
    estimator, count = ESTIMATORS[name]
    for start in range(0, len(traces), count):
        part = traces[start : start + count]
        for trace, advantage in zip(part, estimator(part), strict=True):
            trace.advantage = advantage
    return traces


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_of_an_estimator_are_no_finding(name: str, seed: int) -> None:
    assert {kind: finding.message for kind, finding in found(estimated(name, seed)).items()} == {}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_of_the_opposite_sign_are_found_beside_any_estimator(name: str) -> None:
    traces = estimated(name, 2)
    for trace in traces[STEP : 3 * STEP]:
        trace.advantage = -(trace.advantage or 0.0)
    assert found(traces)


@pytest.mark.parametrize("baseline", ["nothing", "the mean of the step"])
def test_another_baseline_is_found(baseline: str) -> None:
    traces = honest(2)
    for start in range(0, len(traces), STEP):
        step = traces[start : start + STEP]
        middle = fmean(rewards_of(step)) if baseline == "the mean of the step" else 0.0
        for trace in step:
            trace.advantage = trace.value - middle
    assert "advantage-mean" in found(traces)
