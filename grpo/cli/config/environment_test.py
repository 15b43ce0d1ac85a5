"""Options of `quartet environment test`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from rewards.config.data import ProblemOptions
from rewards.config.options import Options


class PlayedDataOptions(ProblemOptions):
    """The data whose columns `reset` gets."""

    limit: int | None = Field(default=8, ge=1)
    """Use only the first rows, at most this many; null uses all."""


class EnvironmentTestConfig(Options):
    """Play scripted episodes in an environment, or with a tool, without a model. A demonstration of each row is played
    where the class has a static method `_demonstration(**columns)`, which gives the calls, [("guess", {"number": 7})],
    or where the solution column has marks such as <<48/2=24>>."""

    command: ClassVar[str] = "environment test"
    data: PlayedDataOptions = PlayedDataOptions()
    max_turns: int = Field(default=8, ge=1)
    """Turns in one episode."""
    program_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that the calls of one turn may take."""
    max_score: float | None = None
    """What `get_reward` gives for a right episode; null: 1, or what the first demonstration gets where that is more."""
    program_memory_mb: int | None = Field(default=None, ge=1)
    """Most MiB of data that the process of the tools may hold; null sets no limit."""
