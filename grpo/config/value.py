"""Options of the value head."""

from __future__ import annotations

from pydantic import Field

from rewards.config.options import Options


class ValueOptions(Options):
    """The value head of `loss.advantage: gae` and `rank_softmax`; names and defaults are PPO's. No sampler gets it, and
    the trunk learns nothing from it."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's λ: 0 trusts the values, 1 the score alone."""
