"""Options of balancing experts and dynamic heads."""

from __future__ import annotations

from pydantic import Field

from rewards.config.options import Options


class BalanceOptions(Options):
    """Keeping the routed experts equally busy: three mechanisms, alone or together, all off by default.

    They look at the tokens of completions. The bias is the same in a rollout and in all updates that learn from it.
    """

    bias_rate: float = Field(default=0.0, ge=0)
    """How far an expert's bias moves after every step: up where it was chosen less than the mean, down where more
    (0.001 in DeepSeek-V3)."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of log E - H(mean soft choice), summed over layers; its mean is over a micro-batch. A weight of 1 balances
    alone; expert groups are not looked at."""
    sequence_weight: float = Field(default=0.0, ge=0)
    """Weight of DeepSeek-V3's balance loss of each completion, summed over layers (0.0001 there)."""
