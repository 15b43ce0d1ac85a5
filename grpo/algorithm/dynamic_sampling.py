"""Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): groups that teach nothing are replaced, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rewards.group_score import GroupScore
from rewards.ties import tied
from rollout.group import Prompt, RolloutGroup

SampleAndScore = Callable[[Sequence[Prompt], int], tuple[list[RolloutGroup], list[GroupScore]]]


@dataclass
class Drawn:
    """The groups that a step learns from, with their scores and the draw that each came from (0: the first).

    `replaced` are the groups that were sampled and not learned from: tied ones whose place another took, and
    refills that were tied again. `metrics` are those of its sampling and scoring.
    """

    groups: list[RolloutGroup]
    scores: list[GroupScore]
    draws: list[int] = field(default_factory=list)
    replaced: list[tuple[RolloutGroup, GroupScore]] = field(default_factory=list)
    refilled: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def tied(self) -> list[int]:
        return [i for i, score in enumerate(self.scores) if is_tied(score)]

    @property
    def all_groups(self) -> list[RolloutGroup]:
        return self.groups + [group for group, _ in self.replaced]

    @property
    def all_scores(self) -> list[GroupScore]:
        return self.scores + [score for _, score in self.replaced]

    def counts(self) -> dict[str, float]:
        return {
            "group/zero_variance": len(self.tied) / len(self.groups),
            "group/resampled": float(self.refilled),
            "group/drawn": float(len(self.all_groups)),
        }


def is_tied(score: GroupScore) -> bool:
    """Every score of the group is the same up to rounding, or there are fewer than two; see rewards.ties."""
    return tied(score.rewards)


def draw_groups(
    prompts: Sequence[Prompt],
    max_resamples: int,
    sample: SampleAndScore,
    replacements: Callable[[list[Prompt], int], Sequence[Prompt]],
) -> Drawn:
    """Sample a group of every prompt; then, at most `max_resamples` times, one for every group that is tied.

    `sample(prompts, draw)` must put `draw` into its noise keys, so that a prompt that is drawn again sees new noise
    (contract 4). `replacements(tied_prompts, draw)` gives one prompt for each: the same, or another. A refill that is
    not tied takes its place. What is still tied when the budget is spent stays.
    """
    groups, scores = sample(prompts, 0)
    drawn = Drawn(list(groups), list(scores), [0] * len(groups))
    for draw in range(1, max_resamples + 1):
        places = drawn.tied
        if not places:
            break
        groups, scores = sample(replacements([drawn.groups[i].prompt for i in places], draw), draw)
        for i, group, score in zip(places, groups, scores, strict=True):
            if is_tied(score):
                drawn.replaced.append((group, score))
                continue
            drawn.replaced.append((drawn.groups[i], drawn.scores[i]))
            drawn.groups[i], drawn.scores[i], drawn.draws[i] = group, score, draw
            drawn.refilled += 1
    return drawn
