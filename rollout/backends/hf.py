"""Decoding any causal LM of transformers, called like `policies.decoding.absorbed.AbsorbedTrunk`.

The model's own forward runs, except for its attention, which is ours. Grouped-query attention is MLA attention with
one latent row per KV head: the vector of a cached token is [value | key], and the query heads that share a KV head are
the attention heads of its row. So the latent cache serves here too: it stores a prompt once, for rows of every length.

Axes: P prompts, G completions each, R rows, S new tokens a row, H query heads, K KV heads, N = H / K.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from policies.attention import attending_by
from policies.decoding.latent_cache import LatentCache, Prefix
from policies.policy import Policy

ATTENTION = "quartet"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # some models add these to their scores


class PromptCache:
    """Keys and values of right-padded prompts. One forward fills it; `fan_out` then shares it among their rows."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}

    def plan(self, new: int) -> None:
        self.layers.clear()

    def attend(
        self,
        module: nn.Module,
        query_PHTD: Tensor,
        key_PKTD: Tensor,
        value_PKTD: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Plain causal attention [P, T, H, ·]. Tokens of a prompt never attend to the padding after it."""
        self.layers[module.layer_idx] = torch.cat([value_PKTD, key_PKTD], dim=-1)
        self.value_width = value_PKTD.shape[-1]
        options: dict[str, Any] = {"attention_mask": None, "is_causal": True}
        if window is not None and query_PHTD.shape[2] > window:
            ones = torch.ones(query_PHTD.shape[2], query_PHTD.shape[2], dtype=torch.bool, device=query_PHTD.device)
            options = {"attention_mask": ones.tril().triu(1 - window), "is_causal": False}
        return sdpa_attention_forward(module, query_PHTD, key_PKTD, value_PKTD, scaling=scale, **options)[0]

    def advance(self, lengths_P: Tensor) -> None:
        self.lengths = lengths_P

    def fan_out(self, group_size: int, capacity: int, longest_prompt: int = 0) -> RowCache:
        """The cache of P · G empty rows that continue these prompts, with room for `capacity` tokens each."""
        if not self.layers:
            raise ValueError("its layers do not attend through the attention interface of transformers")
        entries_LPKTE = torch.stack([self.layers[layer] for layer in sorted(self.layers)])
        prompts, heads = entries_LPKTE.shape[1:3]
        device, count = entries_LPKTE.device, prompts * heads
        prefix = Prefix(
            entries_LPKTE.flatten(1, 2),
            self.lengths.repeat_interleave(heads),
            torch.arange(count, device=device).repeat_interleave(group_size),
        )
        latents = LatentCache.after(prefix, capacity, self.value_width)
        slots = torch.arange(count * group_size, device=device).view(prompts, heads, group_size)
        return RowCache(latents, slots.transpose(1, 2).reshape(-1, heads))


class RowCache:
    """Keys and values of the rows. `slots_RK`: the place of each KV head of each row in the latent cache, which needs
    those of one prompt and attention head side by side, [P, K, G], while rows are [P, G]."""

    def __init__(self, latents: LatentCache, slots_RK: Tensor) -> None:
        self.latents = latents
        self._place(slots_RK)

    def _place(self, slots_RK: Tensor) -> None:
        self.slots_RK, self.order = slots_RK, slots_RK.flatten().argsort()

    def plan(self, new: int) -> None:
        self.latents.plan(new)

    def attend(
        self,
        module: nn.Module,
        query_RHSD: Tensor,
        key_RKSD: Tensor,
        value_RKSD: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Append the new tokens and attend, [R, S, H, ·]."""
        rows, heads = self.slots_RK.shape
        query_RKSND = (query_RHSD * scale).unflatten(1, (heads, -1)).transpose(2, 3)
        entries_RKSE = torch.cat([value_RKSD, key_RKSD], dim=-1)
        out = self.latents.attend(
            module.layer_idx, query_RKSND.flatten(0, 1)[self.order], entries_RKSE.flatten(0, 1)[self.order], window
        )
        out_RKSNV = out[self.slots_RK.flatten()].unflatten(0, (rows, heads))
        return out_RKSNV.transpose(1, 2).flatten(2, 3)

    def advance(self, kept_R: Tensor) -> None:
        self.latents.advance(kept_R.repeat_interleave(self.slots_RK.shape[1])[self.order])

    def join(self, others: Sequence[RowCache]) -> RowCache:
        """One cache with these rows and those of `others`."""
        caches = [self, *others]
        before = accumulate((cache.slots_RK.numel() for cache in caches), initial=0)
        slots = [cache.slots_RK + count for cache, count in zip(caches, before, strict=False)]
        return RowCache(self.latents.join([cache.latents for cache in others]), torch.cat(slots))

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in ascending order, and drop the others."""
        slots_RK = self.slots_RK[rows]
        order = slots_RK.flatten().sort().values
        self.latents.select(order)
        self._place(torch.searchsorted(order, slots_RK))

    def take(self, rows: Tensor, new: Tensor) -> RowCache:
        """A copy of these rows, in ascending order, for a forward of them alone. `put` brings them back."""
        slots_RK = self.slots_RK[rows]
        order = slots_RK.flatten().sort().values
        return RowCache(self.latents.take(order), torch.searchsorted(order, slots_RK))

    def put(self, rows: Tensor, cache: RowCache) -> None:
        """The inverse of `take`."""
        self.latents.put(self.slots_RK[rows].flatten().sort().values, cache.latents)


_CACHE: ContextVar[PromptCache | RowCache] = ContextVar("cache of the forward that runs")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    if added := [name for name in UNSUPPORTED if options.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} adds {added[0]} to its attention scores, which rollouts cannot do")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _CACHE.get().attend(module, query, key, value, scale, sliding_window), None


AttentionInterface.register(ATTENTION, _attend)


class HFTrunk:
    """The model for decoding. The policy must have plain weights; its parameters are cast to `dtype` in place."""

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        for parameter in policy.trunk.parameters():
            parameter.data = parameter.data.to(dtype)
        self.config, self.decoder, self.dtype = policy.config, policy.trunk.get_decoder(), dtype
        self.embedding = policy.trunk.get_input_embeddings().weight.detach()
        self.logits = policy.output.logits
        self.device: torch.device = self.embedding.device

    def cache(self, rows: int, capacity: int, prompts_R: Tensor | None = None) -> PromptCache:
        return PromptCache()

    def __call__(self, token_ids_BS: Tensor, position_ids_BS: Tensor, cache: PromptCache | RowCache) -> Tensor:
        """Final hidden states [B, S, D], after the last norm."""
        cache.plan(token_ids_BS.shape[1])
        active = _CACHE.set(cache)
        try:
            with attending_by(self.config, ATTENTION):
                out = self.decoder(input_ids=token_ids_BS, position_ids=position_ids_BS, use_cache=False)
        finally:
            _CACHE.reset(active)
        return out.last_hidden_state
