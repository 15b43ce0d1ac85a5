"""Options of `quartet audit`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from rewards.config.options import Options
from rewards.config.reward import CallOptions


class RescoringOptions(Options):
    """How the function of --with is run. Its failures are counted."""

    timeout_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds that the function may take per batch of at most 256 completions."""
    pass_variables: list[str] = Field(default_factory=list)
    """Environment variables that the function may read besides the usual few, such as [OPENAI_API_KEY]."""


class AuditConfig(CallOptions):
    """Look for faults in recorded rollouts of TRL, verl, verifiers, prime-rl, NeMo-Gym, a run of ours or anybody."""

    command: ClassVar[str] = "audit"
    ignore: list[str] = Field(default_factory=list)
    """Kinds of findings that are known and accepted, such as `[advantage-mean]`."""
    reward: RescoringOptions = RescoringOptions()
