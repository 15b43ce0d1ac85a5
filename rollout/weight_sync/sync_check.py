"""Canaries: a few completions of fixed prompts that every sampler makes of every version (contract 13).

They go through the ordinary path of sampling, with drafts, at HOTTER times the run's temperature. The learner scores
the very same tokens. A sampler that holds other weights, or computes otherwise, gives other log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch

from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams

METRICS = {
    "sync_check/logprob_abs_mean": "mismatch/logprob_abs_mean on the prompts of the weight-sync check, which sampler "
    "and learner score with the same weights: the effect of precision and backend only, nats",
    "sync_check/logprob_abs_max": "the largest of them",
    "sync_check/repeats": "1 if the check passed only at its second attempt, with other prompts",
    "time/sync_check": "weight-sync check: sampling its prompts, scoring them, comparing checksums; part of "
    "time/sync, seconds",
}
PROMPTS, PROMPT_TOKENS, COMPLETIONS, TOKENS = 3, 12, 4, 4  # many rows, few rounds: a round is what takes time
# A policy that is sure of every token gives log-probabilities of zero whatever is wrong; this much hotter it does not.
HOTTER = 4.0
DRAFTS = 2  # where a controller would choose; its table of costs may not be measured yet


@dataclass(frozen=True)
class Tolerance:
    """The most that |sampler's - learner's log-probability| may be: its mean over all canaries, and that of one token.

    Both are in units of the spread (standard deviation) of the learner's log-probabilities over the canaries: rounding
    moves those of a policy with larger logits, or at a lower temperature, further.
    """

    mean: float
    most: float


# docs/findings.md has what honest publications give.
TOLERANCES = {torch.float32: Tolerance(2e-4, 2e-3), torch.bfloat16: Tolerance(0.1, 2.0)}
LEAST_SPREAD = 0.25  # nats; a policy that is sure of everything has none
SLOPE, ERRORS = 0.05, 4.0  # how far a slope may be from 1: so much, and so many standard errors of it
Scores = list[list[list[float]]]  # by prompt and completion, of each token


@dataclass(frozen=True)
class Agreement:
    """What a publication's canaries gave. `fault` names the worker and the token where a sampler differs."""

    mean: float
    most: float
    fault: str | None


def sync_check_prompts(vocabulary: int, context: int, attempt: int = 0) -> list[Prompt]:
    """Prompts of tokens from everywhere in the vocabulary, the same for every version.

    A second attempt has other prompts. Two experts that are tied within rounding at one token of a prompt change every
    completion of it, whatever its noise.
    """
    length = max(1, min(PROMPT_TOKENS, context // 2))
    first = attempt * PROMPTS * length
    return [
        Prompt(f"canary/{i}", "", [(7919 * (first + i * length + t) + 13) % vocabulary for t in range(length)])
        for i in range(PROMPTS)
    ]


def sync_check_params(params: SamplingParams, context: int) -> SamplingParams:
    """The parameters of canaries, which are `params` but hotter, short, of full length, and with drafts that need no
    table of costs."""
    drafts = DRAFTS if params.draft_tokens is None else params.draft_tokens
    return replace(
        params,
        group_size=COMPLETIONS,
        temperature=HOTTER * params.temperature,
        max_completion_tokens=max(1, min(TOKENS, context - context // 2)),
        stop_token_ids=(),
        stop_strings=(),
        draft_tokens=drafts,
        record_routing=False,
    )


def compare(
    sampled: Mapping[str, Sequence[RolloutGroup]], scores: Mapping[str, Scores], version: int, dtype: torch.dtype
) -> Agreement:
    """Measures how far log-probabilities of each sampler are from the learner's `scores`, over all samplers the worst.

    Another temperature moves all of them in proportion, which a straight line through them shows where rounding would
    hide it from the differences: its slope is the learner's temperature by the sampler's.
    """
    worst = Agreement(0.0, 0.0, None)
    for worker, groups in sampled.items():
        tokens = [
            (_apart(ours, score), group, i, t, ours, score)
            for group, by_completion in zip(groups, scores[worker], strict=True)
            for i, (completion, of_learner) in enumerate(zip(group.completions, by_completion, strict=True))
            for t, (ours, score) in enumerate(zip(completion.logprobs, of_learner, strict=True))
        ]
        mean, most = sum(far for far, *_ in tokens) / len(tokens), max(far for far, *_ in tokens)
        own_N, score_N = (torch.tensor([entry[at] for entry in tokens], dtype=torch.float64) for at in (4, 5))
        finite_N = score_N.nan_to_num(0.0, 0.0, 0.0)  # one that is not is infinitely far, whatever the spread
        spread = max(finite_N.std(unbiased=False).item(), LEAST_SPREAD)
        tolerance = Tolerance(*(limit * spread for limit in astuple(TOLERANCES[dtype])))
        fault = worst.fault
        if not fault and (mean > tolerance.mean or most > tolerance.most):
            limit = tolerance.most if most > tolerance.most else tolerance.mean
            _, group, i, t, ours, score = next(each for each in tokens if each[0] > limit)
            fault = (
                f"{worker} computes other log-probabilities than the learner with version {version}: mean difference "
                f"{mean:.2g}, largest {most:.2g} nats, where {tolerance.mean:.2g} and {tolerance.most:.2g} are allowed "
                f"in {str(dtype).removeprefix('torch.')}. The first token that differs is token {t} of completion {i} "
                f"of {group.prompt.prompt_id}, id {group.completions[i].token_ids[t]}: sampler {ours:.5f}, learner "
                f"{score:.5f}"
            )
        elif not fault and (slope := _wrong_slope(own_N, score_N)):
            fault = (
                f"{worker} samples version {version} at another temperature than the learner: its log-probabilities "
                f"are those of {1 / slope:.3g} times the temperature that was asked for"
            )
        worst = Agreement(max(worst.mean, mean), max(worst.most, most), fault)
    return worst


def _apart(one: float, other: float) -> float:
    """How far two log-probabilities are apart: infinitely, where one of them is no finite number."""
    far = abs(one - other)
    return far if math.isfinite(far) else math.inf


def _wrong_slope(own_N: torch.Tensor, score_N: torch.Tensor) -> float | None:
    """The slope of the least-squares line of `own_N` over `score_N`, where it cannot be 1."""
    own, score = own_N - own_N.mean(), score_N - score_N.mean()
    square = score.square().sum().item()
    if not square > 0:
        return None
    slope = (own @ score).item() / square
    error = ((own - slope * score).square().mean().item() / square) ** 0.5
    return slope if slope > 0 and abs(slope - 1) > SLOPE + ERRORS * error else None


def sync_check_difference(
    groups: Sequence[RolloutGroup], passed: Sequence[RolloutGroup], dtype: torch.dtype
) -> str | None:
    """Tells how the canaries of a sampler differ from those of one that has passed, or None.

    The tokens are the same up to ties, and where two completions part, no more of them is compared.
    """
    far, count, total = [0.0], 0, 0
    for mine, other in zip(groups, passed, strict=True):
        for one, two in zip(mine.completions, other.completions, strict=True):
            total += len(two.token_ids)
            for t, (token, expected) in enumerate(zip(one.token_ids, two.token_ids, strict=True)):
                if token != expected:
                    break
                far.append(_apart(one.logprobs[t], two.logprobs[t]))
                count += 1
    limit = TOLERANCES[dtype].most * LEAST_SPREAD
    if 2 * count >= total and max(far) <= limit:
        return None
    return f"samples other canaries than those before it: {count} of {total} tokens, {max(far):.2g} nats apart"
