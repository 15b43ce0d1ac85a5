"""Options of the value head."""

from __future__ import annotations

from pydantic import Field

from grpo.config.options import Options


class ValueOptions(Options):
    """The value head of `loss.advantage: gae` and `rank_softmax`; names and defaults are PPO's. No sampler gets it."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the head."""
    hidden_size: int = Field(default=128, ge=0)
    """Width of its hidden layer; 0 is a linear head."""
    train_trunk: bool = False
    """Let the value loss train the trunk as well, times vf_coef; else the head reads detached hidden states."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss in the trunk's gradient; the head's own steps hardly depend on it."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """A value that moved further than this from its old one learns no further from the same batch."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's λ: 0 trusts the values, 1 the score alone."""
    whiten_advantages: bool = True
    """Give advantages mean 0 and standard deviation 1 over the step's tokens."""
    rank_temperature: float = Field(default=1.0, gt=0)
    """rank_softmax: weights are softmax(rank / this); a high one weighs all completions alike."""
