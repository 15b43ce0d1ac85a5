"""Options of the value head."""

from __future__ import annotations

from pydantic import Field

from rewards.config.options import Options


class ValueOptions(Options):
    """The value head of `loss.advantage: gae` and `rank_softmax`; names and defaults are PPO's. No sampler gets it."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the value head."""
    vf_coef: float = Field(default=0.0, ge=0)
    """Weight of the value loss in the trunk's gradient, such as 0.1; with 0 the value head reads detached hidden
    states, and the trunk learns nothing from it."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's λ: 0 trusts the values, 1 the score alone."""
