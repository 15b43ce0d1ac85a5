"""Options of `quartet reward test` and `quartet reward replay`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from rewards.commands.probes import ANSWER, BARE
from rewards.config.data import ProblemOptions
from rewards.config.options import Options
from rewards.config.reward import CallOptions


class TriedDataOptions(ProblemOptions):
    """The data that a reward function is tried on."""

    limit: int | None = Field(default=200, ge=1)
    """Use only the first rows, at most this many; null uses all."""


class TriedScoringOptions(Options):
    """How the function is run, and what happens when it fails."""

    on_error: str = Field(default="abort", pattern=r"^(abort|drop_sample)$")
    """`abort` ends at the first failure; `drop_sample` counts failures and goes on."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds that the function may take per batch of at most 256 completions."""
    pass_variables: list[str] = Field(default_factory=list)
    """Environment variables that the function may read besides the usual few, such as [OPENAI_API_KEY]."""


class RewardTestConfig(CallOptions):
    """Try a reward function on data, without a model: gold solutions get full marks, empty and wrong ones do not."""

    command: ClassVar[str] = "reward test"
    data: TriedDataOptions = TriedDataOptions()
    reward: TriedScoringOptions = TriedScoringOptions()
    template: str = BARE
    """How a completion is made of a gold solution where the data have bare answers: `<answer>{answer}</answer>`."""
    max_score: float | None = None
    """What a right completion scores; by default what the function declares (`rewards.right_at`), else 1, or what the
    first gold solution gets where that is more."""
    shaping: bool = False
    """The function does not judge the answer (a format, a length): any completion may get full marks, or miss them."""

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if ANSWER not in template:
            raise ValueError(f"there is no {ANSWER}, which a gold solution takes the place of; add it")
        return template


class ReplayedDataOptions(ProblemOptions):
    """Where the columns of another tool's rollouts are, whose files hold none of the data's."""

    name: str | None = None  # type: ignore[assignment]
    """As for `reward test`; a row belongs to the prompts that hold its question. null: the files have the columns."""


class ReplayConfig(CallOptions):
    """Score recorded completions again with another function, those of a run in as many processes as it had, and show
    what changes."""

    command: ClassVar[str] = "reward replay"
    data: ReplayedDataOptions = ReplayedDataOptions()
    reward: TriedScoringOptions = TriedScoringOptions()
    against: str | None = None
    """The recorded value to compare with: a reward's name, or `score` for the weighted sum. null takes the reward of
    the same name, else the only one, else `score`. TRL does not record `score` for several rewards."""
    steps: list[int] | None = None
    """Steps to score, such as `[1, 50]`; null scores all that are recorded."""
