"""Options of the curriculum."""

from __future__ import annotations

from pydantic import Field

from rewards.config.options import Options


class CurriculumOptions(Options):
    """What GRPO begins with: problems with short solutions. Off by default."""

    steps: int = Field(default=100, ge=1)
    """The step at which all examples may be drawn; their share grows linearly until then."""
    shortest_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training examples that may be drawn at step 1: those with the shortest gold solutions. Among the
    examples that may be drawn, those drawn least often come first."""
