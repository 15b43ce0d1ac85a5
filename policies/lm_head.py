"""How logits follow from the last hidden state: LM head · hidden, which some models scale, shift or cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from policies.paths import States
from policies.sharding import decoder

# Fields of configurations: by the first logits are multiplied, and by the second divided. HyperCLOVA X multiplies.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, eq=False)
class LMHead:
    """`cap` · tanh(x / `cap`) of x = `scale` · (`weight` · hidden + `bias`), or x where there is no cap.

    >>> LMHead(torch.eye(2), scale=0.5).logits(torch.tensor([2.0, 4.0]))
    tensor([1., 2.])
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        x = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            x = x * self.scale
        return x if self.cap is None else self.cap * torch.tanh(x / self.cap)


def last_states(trunk: PreTrainedModel, by: States, **options: object) -> tuple[Tensor, Any]:
    """The states [B, T, D] that the LM head of a model multiplies, and all that transformers gave with them."""
    if by == "decoder":
        out = decoder(trunk)(**options)
        return out.last_hidden_state, out
    lm_head: nn.Module = trunk.get_output_embeddings()
    lm_head.forward = lambda states: states
    try:
        out = trunk(**options)
    finally:
        del lm_head.forward
    return out.logits, out


def scale_and_cap(config: PretrainedConfig) -> tuple[float, float | None]:
    """What the model of this configuration does to its logits, by the fields that are known to say so. The load check
    compares the result with the model's own forward."""
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    for name in DIVISORS:
        value = _number(config, name) or 1.0
        scale *= value if config.model_type == "hyperclovax" else 1 / value
    return scale, next((cap for name in CAPS if (cap := _number(config, name))), None)


def _number(config: object, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None
