"""Options of the policy loss, and of the value head that some advantage estimators use."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rewards.config.options import Options

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "reinforce"]
Level = Literal["token", "sequence"]
KLEstimator = Literal["none", "k1", "k2", "k3", "unbiased"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
Advantage = Literal[
    "group_relative", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae", "rank_softmax", "distill"
]


def _names_a_function(name: str) -> str:
    if not re.search(r"\.py:\w+$", name):
        raise ValueError("path/to/file.py:function")  # completes "expected 'grpo', 'dapo' or"
    return name


Own = Annotated[str, AfterValidator(_names_a_function), "FILE.py:FUNCTION"]


# What a loss does not read, so that another value than the default is a mistake; and what is meant.
UNREAD = {
    "sapo": ("epsilon", "epsilon_high", "delta"),  # it has a gate of fixed temperatures in place of a clip
    "cispo": ("epsilon", "delta"),
    "reinforce": ("epsilon", "epsilon_high", "delta"),
}
INSTEAD = {"cispo": "epsilon_high, the cap of the ratio"}


class LossOptions(Options):
    """The policy loss; names, meanings and defaults are TRL's where both have them."""

    loss_type: LossType | Own = "dapo"
    """Aggregation and surrogate: grpo, dr_grpo, dapo, bnpo, cispo, sapo, or reinforce (−Â·log π, a token mean); or
    `path/to/file.py:function`, marked with `@grpo.objective`."""
    importance_sampling_level: Level = "token"
    """`token`, or `sequence` (GSPO)."""
    scale_rewards: ScaleRewards = "group"
    """Which standard deviation divides a group's centred rewards."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """Several rewards: sum and normalise, or normalise each first."""
    advantage: Advantage | Own = "group_relative"
    """The estimator. `gae` is PPO, `rank_softmax` weighs GAE by rank in the group (loss_type reinforce); both use the
    value head (`value`). `distill` learns from a teacher (`distill`). Or `path/to/file.py:function`, marked with
    `@grpo.advantage`."""
    epsilon: float = Field(default=0.2, ge=0)
    """Clip range below 1."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """Clip range above 1; epsilon by default (DAPO uses 0.28; CISPO reads it as the cap itself)."""
    delta: float | None = Field(default=None, gt=1)
    """Upper bound of the ratio for negative advantages (two-sided clipping)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty towards the reference policy; 0 needs no reference."""
    kl_estimator: KLEstimator = "unbiased"
    """Estimator of that KL."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    top_entropy_quantile: float = Field(default=1.0, ge=0, le=1)
    """Train on this share of the step's tokens, highest entropy first (TRL: of each micro-batch); 0 keeps the top one.
    Below 1 it costs one more forward per batch."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss."""
    importance_correction: CorrectionMode | Literal["auto", "none"] = "auto"
    """Correction for a sampler that differs from the learner, with weights of at most 3; `auto` is token_truncate below
    float32, else none (TRL with vLLM: always sequence_mask)."""

    def with_loss_type(self, loss_type: str) -> LossOptions:
        """These options with another loss type. What that does not read, or reads as something else, is left out.

        >>> LossOptions(epsilon=0.1, beta=0.2).with_loss_type("reinforce").beta
        0.2
        """
        left_out = {"loss_type", *UNREAD.get(loss_type, ())}
        if loss_type != self.loss_type and "cispo" in (loss_type, self.loss_type):
            left_out.add("epsilon_high")  # a cap for the one, the end of a clip range for the other
        return LossOptions.model_validate(self.model_dump(exclude=left_out) | {"loss_type": loss_type})

    @model_validator(mode="before")
    @classmethod
    def _third_phase(cls, options: object) -> object:
        """rank_softmax updates by -mean(weight · Â · log π), unless another loss is asked for by name."""
        if isinstance(options, dict) and options.get("advantage") == "rank_softmax":
            return {"loss_type": "reinforce"} | options
        return options

    @model_validator(mode="after")
    def _says_nothing_that_is_not_read(self) -> LossOptions:
        for name in UNREAD.get(self.loss_type, ()):
            if (value := getattr(self, name)) != LossOptions.model_fields[name].default:
                raise ValueError(
                    f"{name}={value}: loss_type {self.loss_type} does not read it; leave it out, or use "
                    f"{INSTEAD.get(self.loss_type, 'another loss_type')}"
                )
        return self

    @model_validator(mode="after")
    def _penalty_has_an_estimator(self) -> LossOptions:
        if self.beta and self.kl_estimator == "none":
            raise ValueError(
                f"beta={self.beta} weighs a KL penalty, but kl_estimator=none computes none: choose k1, k2, k3 or "
                "unbiased, or drop beta"
            )
        return self
