"""Options of the curriculum."""

from __future__ import annotations

from pydantic import Field

from rewards.config.options import Options


class CurriculumOptions(Options):
    """What GRPO begins with: problems with short solutions, and those that can be learned from. Off by default."""

    steps: int = Field(default=100, ge=1)
    """The step at which all examples may be drawn; their share grows linearly until then."""
    shortest_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training examples that may be drawn at step 1: those with the shortest gold solutions. Among the
    examples that may be drawn, those drawn least often come first."""
    by_difficulty: bool = False
    """Draw prompts in proportion to p(1−p), where p is the running share of a prompt's completions with full marks (1,
    what a gold solution gets where that is more, or what the reward declares). What a prompt
    that was not drawn yet will pass is predicted from its words. Of more than 2,000 prompts each draw weighs 2,000."""
    candidates: int = Field(default=1, ge=1)
    """Prompts that are drawn for each that is used. One completion of each is sampled first, and is not learned from;
    the prompts whose completion was least likely get a group. 1 uses all. It pays where the policy is sure of most of
    its answers, so that most groups are tied."""
