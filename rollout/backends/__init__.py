"""What decodes: our absorbed MLA with its MTP head, or any causal LM of transformers. The engine is the same."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from policies.decoding.absorbed import AbsorbedTrunk
from policies.mtp import AbsorbedHead
from policies.policy import Policy
from rollout.backends.hf import HFTrunk


class DecodingTrunk(Protocol):
    """Token ids and positions [B, S] and a cache in, final hidden states [B, S, D] out."""

    device: torch.device
    dtype: torch.dtype
    embedding: Tensor  # [V, D]

    def cache(self, rows: int, capacity: int) -> Any: ...

    def __call__(self, token_ids_BS: Tensor, position_ids_BS: Tensor, cache: Any) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def derive(policy: Policy, dtype: torch.dtype) -> tuple[DecodingTrunk, AbsorbedHead | None]:
    """Trunk and draft head for decoding, with everything derived from the policy's present weights."""
    if policy.backend == "transformers":
        return HFTrunk(policy.trunk, dtype), None
    trunk = AbsorbedTrunk(policy.trunk, dtype, policy.max_length)
    return trunk, AbsorbedHead(policy.mtp, trunk, policy.draft_ids) if policy.mtp is not None else None
