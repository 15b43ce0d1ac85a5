"""The MTP head as it decodes: absorbed like the trunk, with the trunk's embedding, rotary table and LM head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding.absorbed import AbsorbedBlock, AbsorbedTrunk
from policies.decoding.latent_cache import LatentCache
from policies.decoding.linear import FixedLinear, kind_of
from policies.decoding.quantized import kind_now
from policies.mtp import MTPHead


class AbsorbedHead:
    """The draft head as samplers use it: plain tensors and the absorbed block, which each publication derives again."""

    def __init__(self, head: MTPHead, trunk: AbsorbedTrunk, draft_ids: Tensor | None = None) -> None:
        """Only the tokens `draft_ids` [K], ascending, have `logits`; None: all have."""
        dtype = trunk.dtype
        self.trunk, self.config = trunk, head.config
        self.enorm = head.enorm.weight.detach().to(dtype)
        self.hnorm = head.hnorm.weight.detach().to(dtype)
        self.eh_proj = FixedLinear(head.eh_proj.weight.detach().to(dtype))
        self.norm = head.norm.weight.detach().to(dtype)
        self.block = AbsorbedBlock(head.block, head.config, dtype)
        self.draft_ids = draft_ids
        shared = draft_ids is None and kind_of(trunk.logits) == kind_now()
        self.logits = (
            trunk.logits if shared else FixedLinear(trunk.head if draft_ids is None else trunk.head[draft_ids])
        )

    def cache(self, rows: int, capacity: int) -> LatentCache:
        """An empty cache without the first token of each row, for which the draft head has no entry."""
        return self.trunk.cache_of(1, rows, capacity, first=1)

    def __call__(self, token_ids_BS: Tensor, hidden_BSD: Tensor, position_ids_BS: Tensor, cache: LatentCache) -> Tensor:
        """Entries for these tokens, given the hidden states that precede them; outputs [B, S, D]."""
        cache.plan(token_ids_BS.shape[1])
        width, eps = (hidden_BSD.shape[-1],), self.config.rms_norm_eps
        embeddings = F.embedding(token_ids_BS, self.trunk.embedding)
        embeddings = F.rms_norm(embeddings, width, self.enorm, eps)
        hidden = F.rms_norm(hidden_BSD, width, self.hnorm, eps)
        x = self.eh_proj(torch.cat([embeddings, hidden], dim=-1))
        x = self.block(x, self.trunk.rope(position_ids_BS), cache, 0)
        return F.rms_norm(x, width, self.norm, eps)
