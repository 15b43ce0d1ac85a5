"""From rollouts and their scores to a training batch: the chosen advantage of every completion, groups packed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from grpo.algorithm import advantages, own
from grpo.config.loss import CorrectionMode, LossOptions, ValueOptions
from grpo.learner.batch import MicroBatch, Sample, TrainingBatch, split_rows
from grpo.learner.parallel import Ranks
from grpo.learner.value import with_token_advantages
from rollout.group import ENDED, RolloutGroup, draft_gain

if TYPE_CHECKING:
    from rewards.scorer import GroupScore


def estimate(
    scores: Sequence[GroupScore], loss: LossOptions, reward_weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Advantages [P, G] by `loss.advantage`, and which groups are tied [P]. Zeros where a value function is needed."""
    rewards_PG = [score.rewards for score in scores]
    if own.is_own(loss.advantage):
        return own.estimate(loss.advantage, rewards_PG)
    match loss.advantage:
        case "gae" | "rank_softmax":
            return torch.zeros(len(scores), len(rewards_PG[0])), advantages.tied_groups(rewards_PG)
        case "rloo":
            return advantages.rloo(rewards_PG)
        case "reinforce_plus_plus":
            return advantages.reinforce_plus_plus(rewards_PG)
        case "reinforce_plus_plus_baseline":
            return advantages.reinforce_plus_plus(rewards_PG, baseline=True)
    if loss.multi_objective_aggregation == "sum_then_normalize":
        return advantages.group_relative(rewards_PG, loss.scale_rewards)
    parts_PGK = [
        [
            [None if reward is None else score.parts[name][i] for name in reward_weights]
            for i, reward in enumerate(score.rewards)
        ]
        for score in scores
    ]
    return advantages.multi_objective(
        parts_PGK, list(reward_weights.values()), "normalize_then_sum", loss.scale_rewards
    )


def pack(
    groups: Sequence[RolloutGroup],
    scores: Sequence[GroupScore],
    loss: LossOptions,
    reward_weights: Mapping[str, float],
    *,
    max_tokens: int,
    routing_replay: bool = False,
) -> TrainingBatch:
    """Groups with their prompt once, in rows of `max_tokens`; a completion without reward has no place in them. The
    segments of an agent's episodes are packed by their prompts.

    Raises ValueError where `routing_replay` finds nothing recorded.
    """
    advantages_PG, tied_P = estimate(scores, loss, reward_weights)
    rows, tokens, count = [], 0, 0
    size = len(groups[0].completions)
    for g, (group, score) in enumerate(zip(groups, scores, strict=True)):
        by_prompt: dict[tuple[int, ...], list[Sample]] = {}  # those of agents differ within a group
        for i, c in enumerate(group.completions):
            for prompt_ids, at in c.parts(group.prompt) if score.rewards[i] is not None else ():
                sample = Sample(
                    g * size + i,
                    c.token_ids[at],
                    c.logprobs[at],
                    advantages_PG[g, i].item(),
                    c.finish_reason,
                    routing=_recorded(c.routing, group) if routing_replay else None,
                    sampled=c.sampled[at],
                    start=at.start,
                )
                by_prompt.setdefault(tuple(prompt_ids), []).append(sample)
        for prompt, samples in by_prompt.items():
            count += len(samples)
            tokens += tokens_in_loss(samples, loss)
            routing = _recorded(group.prompt_routing, group) if routing_replay else None
            rows += split_rows(list(prompt), samples, max_tokens, routing, group=g)
    versions, completions = Counter[int](), [completion for group in groups for completion in group.completions]
    for completion in completions:
        versions.update(completion.versions or {completion.policy_version: completion.num_sampled})
    return TrainingBatch(
        rows,
        advantages_PG,
        count,
        tokens,
        int(tied_P.sum()),
        tokens_by_version=dict(versions),
        draft_gain=draft_gain(completions),
    )


@torch.no_grad()
def with_values(
    batch: TrainingBatch,
    scores: Sequence[GroupScore],
    loss: LossOptions,
    options: ValueOptions,
    values_of: Callable[[MicroBatch], Tensor],  # [C, L]: the value before each token
    minis: Iterable[MicroBatch],  # of this rank
    ranks: Ranks,
) -> TrainingBatch:
    """Advantages of every token, from the values that the states had when they were sampled."""
    started = time.perf_counter()
    values: dict[int, Tensor] = {}
    for mini in minis:
        values_CL = values_of(mini)
        own = {s.index: values_CL[c, : len(s.token_ids)].cpu() for c, s in enumerate(mini.samples)}
        values |= own if mini.counts else {}
    values = ranks.union(values)
    rewards_PG = [score.rewards for score in scores]
    weights_PG = None
    if loss.advantage == "rank_softmax":
        weights_PG = advantages.rank_softmax_weights(rewards_PG, options.rank_temperature)
    left_out = [s.index for row in batch.rows for s in row.samples if not in_loss(s, loss)]
    batch = with_token_advantages(batch, values, rewards_PG, options, weights_PG=weights_PG, left_out=left_out)
    return replace(batch, seconds=time.perf_counter() - started)


def tokens_in_loss(samples: Sequence[Sample], loss: LossOptions) -> int:
    return sum(sample.num_sampled for sample in samples if in_loss(sample, loss))


def in_loss(sample: Sample, loss: LossOptions) -> bool:
    return sample.finish_reason in ENDED or not loss.mask_truncated_completions


def _recorded(routing: Tensor | None, group: RolloutGroup) -> Tensor:
    if routing is None:
        raise ValueError(
            f"learner.routing_replay: the sampler recorded no experts or heads for prompt {group.prompt.prompt_id!r}; "
            "set it to false, or sample with an engine that records them"
        )
    return routing


def importance_correction_of(option: CorrectionMode | Literal["auto", "none"], differs: bool) -> CorrectionMode | None:
    """Contract 8: what the user chose; by itself, on where sampler and learner differ."""
    if option == "auto":
        return "token_truncate" if differs else None
    return None if option == "none" else option
