"""From rollouts and their scores to a training batch: the chosen advantage of every completion, groups packed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from grpo.algorithm import advantages, own
from grpo.algorithm.advantages import LARGEST_SCORE
from grpo.config.loss import LossOptions
from grpo.learner.batch import TrainingBatch, split_rows
from grpo.learner.row import PackedRow, Sample
from rollout.draft_stats import draft_gain
from rollout.group import ENDED, Completion, RolloutGroup

if TYPE_CHECKING:
    from grpo.learner.lessons import Lesson
    from rewards.scorer import GroupScore


OWN_ESTIMATORS = ("group_relative", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
Advantages: TypeAlias = Tensor | Sequence[Sequence[Sequence[float]]]  # [P, G], or by token [P, G, Lc]


def check_groups(
    groups: Sequence[RolloutGroup],
    scores: Sequence[GroupScore] | None,
    advantages: Advantages | Sequence[Sequence[float]] | None,
    temperature: float,
) -> None:
    """Raises ValueError, with the place in [group, sample], where groups, scores and advantages do not fit together, a
    number is not finite, or a completion was sampled at another temperature than log-probabilities are computed at."""
    for name, of_groups in (("scores", scores), ("advantages", advantages)):
        if of_groups is not None and len(of_groups) != len(groups):
            raise ValueError(f"{name}: {len(of_groups)} for {len(groups)} groups; give one for each")
    dims = set()
    for g, group in enumerate(groups):
        size = len(group.completions)
        if not size:
            raise ValueError(f"group {g} has no completions; leave it out")
        if not (group.prompt.token_ids or any(completion.segments for completion in group.completions)):
            raise ValueError(f"group {g}: its prompt has no tokens, and a policy continues at least one; leave it out")
        if size != len(groups[0].completions):
            raise ValueError(
                f"group {g} has {size} completions, and group 0 has {len(groups[0].completions)}; learn from groups of "
                "different sizes in batches of their own"
            )
        rewards = [0.0] * size if scores is None else scores[g].rewards
        given = {"rewards": rewards} if advantages is None else {"rewards": rewards, "advantages": advantages[g]}
        for name, values in given.items():
            if len(values) != size:
                raise ValueError(f"group {g}: {len(values)} {name} for {size} completions; give one for each")
        for i, (completion, reward) in enumerate(zip(group.completions, rewards, strict=True)):
            place = f"group {g}, sample {i}"
            if reward is not None:
                _check_completion(place, completion, reward, temperature)
            if advantages is not None:
                dims.add(_check_advantage(place, advantages[g][i], len(completion.token_ids)))
    if len(dims) > 1:
        raise ValueError("advantages: some are of completions and some of tokens; give all alike")


def _check_completion(place: str, completion: Completion, reward: float, temperature: float) -> None:
    if not abs(reward) <= LARGEST_SCORE:  # nor NaN
        raise ValueError(
            f"{place}: its reward is {reward}; give a number between ±{LARGEST_SCORE:g}, or None to leave it out"
        )
    if completion.temperature not in (None, temperature):
        raise ValueError(
            f"{place} was sampled at temperature {completion.temperature:g}, and its log-probabilities are computed at "
            f"rollout.temperature={temperature:g}; sample at that temperature, or set the option"
        )
    tokens, known = len(completion.token_ids), len(completion.logprobs)
    if known != tokens:
        raise ValueError(f"{place}: {known} log-probabilities for {tokens} tokens; give one for each")
    if not all(map(math.isfinite, completion.logprobs)):
        raise ValueError(f"{place}: one of its log-probabilities is not finite; leave it out by the reward None")


def _check_advantage(place: str, advantage: Any, tokens: int) -> int:
    """Gives the number of dimensions: 0 for one number, 1 for one of each token. A tensor may be padded at the end."""
    values = torch.as_tensor(advantage, dtype=torch.float32)
    padded = isinstance(advantage, Tensor) and len(values.shape) == 1 and len(values) > tokens
    if values.dim() > 1 or (values.dim() == 1 and len(values) != tokens and not padded):
        raise ValueError(f"{place}: advantages of shape {list(values.shape)} for {tokens} tokens; give one for each")
    if not torch.isfinite(values[:tokens] if values.dim() else values).all():
        raise ValueError(f"{place}: an advantage is not finite")
    return values.dim()


def estimate(
    scores: Sequence[GroupScore],
    loss: LossOptions,
    reward_weights: Mapping[str, float],
    lengths_PG: Sequence[Sequence[int]] = (),
) -> tuple[Advantages, Tensor]:
    """Advantages by `loss.advantage`, and which groups are tied [P]. An estimator of the user's gets the number of
    tokens of each completion. A term of the loss that brings an estimator begins with the advantages of the group."""
    rewards_PG = [score.rewards for score in scores]
    if own.is_own(loss.advantage):
        parts = {}
        for name in scores[0].parts:
            parts[name] = [score.parts[name] for score in scores]
        return own.estimate(loss.advantage, rewards_PG, lengths_PG or [[1] * len(row) for row in rewards_PG], parts)
    match loss.advantage:
        case "rloo":
            return advantages.rloo(rewards_PG)
        case "reinforce_plus_plus":
            return advantages.reinforce_plus_plus(rewards_PG)
        case "reinforce_plus_plus_baseline":
            return advantages.reinforce_plus_plus(rewards_PG, baseline=True)
    unknown = any(reward_weights.keys() - score.parts.keys() for score in scores)  # marks of a loop's own
    if loss.multi_objective_aggregation == "sum_then_normalize" or unknown:
        return advantages.group_relative(rewards_PG, loss.scale_rewards)
    parts_PGK = [_parts_by_completion(score, reward_weights) for score in scores]
    return advantages.multi_objective(
        parts_PGK, list(reward_weights.values()), "normalize_then_sum", loss.scale_rewards
    )


def _parts_by_completion(score: GroupScore, names: Iterable[str]) -> list[list[float | None]]:
    """What each function gave each completion of a group [G][K]; None where the completion has no reward."""
    parts_GK: list[list[float | None]] = []
    for i, reward in enumerate(score.rewards):
        parts_GK.append([None if reward is None else score.parts[name][i] for name in names])
    return parts_GK


def pack(
    groups: Sequence[RolloutGroup],
    scores: Sequence[GroupScore],
    advantages: Advantages | Sequence[Sequence[float]],
    tied_P: Tensor,
    *,
    max_tokens: int,
    routing_replay: bool,
    mask_truncated: bool,
) -> TrainingBatch:
    """Groups with their prompt once, in rows of `max_tokens`, with these advantages. A completion without reward has no
    place in them. The segments of an agent's episodes are packed by their prompts.

    Raises ValueError where `routing_replay` finds nothing recorded.
    """
    by_group = _by_group(advantages, groups)
    rows, count = [], 0
    size = len(groups[0].completions)
    for g, (group, score) in enumerate(zip(groups, scores, strict=True)):
        by_prompt: dict[tuple[int, ...], list[Sample]] = {}  # those of agents differ within a group
        for i, c in enumerate(group.completions):
            advantage = by_group[g][i]
            for prompt_ids, at in c.parts(group.prompt) if score.rewards[i] is not None else ():
                sample = Sample(
                    g * size + i,
                    c.token_ids[at],
                    c.logprobs[at],
                    advantage.item() if isinstance(advantage, Tensor) else 0.0,
                    c.finish_reason,
                    token_advantages=[] if isinstance(advantage, Tensor) else list(advantage[at]),
                    routing=_recorded(c.routing, group) if routing_replay else None,
                    sampled=c.sampled[at],
                    start=at.start,
                    in_loss=c.finish_reason in ENDED or not mask_truncated,
                )
                by_prompt.setdefault(tuple(prompt_ids), []).append(sample)
        for prompt, samples in by_prompt.items():
            count += len(samples)
            routing = _recorded(group.prompt_routing, group) if routing_replay else None
            rows += split_rows(list(prompt), samples, max_tokens, routing, group=g)
    versions, completions = Counter[int](), list(chain.from_iterable(group.completions for group in groups))
    for completion in completions:
        versions.update(completion.versions or {completion.policy_version: completion.num_sampled})
    return TrainingBatch(
        rows,
        by_group if isinstance(by_group, Tensor) else [list(map(list, group)) for group in by_group],
        count,
        tokens_in_loss(rows),
        tied_groups=int(tied_P.sum()),
        tokens_by_version=dict(versions),
        draft_gain=draft_gain(completions),
    )


def _by_group(advantages: Any, groups: Sequence[RolloutGroup]) -> Advantages:
    """Numbers of completions as a tensor [P, G]; those of tokens, which may be tensors too, as lists."""
    if isinstance(advantages, Tensor) and advantages.dim() == 2:
        return advantages
    if isinstance(advantages[0][0], int | float) or getattr(advantages[0][0], "ndim", 1) == 0:
        return torch.tensor([list(map(float, of)) for of in advantages], dtype=torch.float32)
    by_group: list[list[list[float]]] = []
    for of, group in zip(advantages, groups, strict=True):
        by_group.append([])
        for each, c in zip(of, group.completions, strict=True):
            values = each.tolist() if hasattr(each, "tolist") else list(each)
            by_group[-1].append(values[: len(c.token_ids)])
    return by_group


def supervised(rows: Sequence[PackedRow], step: int = 0) -> TrainingBatch:
    """A batch of gold solutions, one in each row."""
    numbered = []
    for i, row in enumerate(rows):
        samples = [replace(sample, index=i) for sample in row.samples]
        numbered.append(replace(row, group=i, samples=samples))
    tokens = sum(row.num_completion_tokens for row in rows)
    return TrainingBatch(numbered, torch.zeros(len(rows), 1), len(rows), tokens, step, kind="solutions")


def recorded(lessons: Sequence[Lesson], step: int = 0, draft_depth: int | None = None) -> TrainingBatch:
    """A batch for the draft head, of what the trunk has read once."""
    tokens = sum(lesson.tokens for lesson in lessons)
    of_lessons: dict[str, Any] = {"draft_depth": draft_depth, "lessons": lessons, "kind": "lessons"}
    return TrainingBatch([], torch.zeros(0, 1), 0, tokens, step, **of_lessons)


def tokens_in_loss(rows: Sequence[PackedRow]) -> int:
    samples = chain.from_iterable(row.samples for row in rows)
    return sum(sample.num_sampled for sample in samples if sample.in_loss)


def _recorded(routing: Tensor | None, group: RolloutGroup) -> Tensor:
    if routing is None:
        raise ValueError(
            f"learner.routing_replay: the sampler recorded no experts or attention heads for prompt "
            f"{group.prompt.prompt_id!r}; set it to false, or sample with an engine that records them"
        )
    return routing
