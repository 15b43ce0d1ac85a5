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

from policies.attention import attending_by
from policies.decoding.latent_cache import LatentCache, Prefix
from policies.mtp import cast_parameters
from policies.policy import Policy
from policies.scoring import Scoring, has_indexer, sdpa
from rollout.backends.states import RowStates

ATTENTION = "quartet"


class PromptCache:
    """Keys and values of right-padded prompts, and the states beside them, if there are any. One forward fills it;
    `fan_out` then shares it among their rows. What all of them begin with may be there `before`, read once."""

    before: PromptCache | None = None

    def __init__(self, states: RowStates | None = None) -> None:
        self.layers: dict[int, Tensor] = {}
        self.value_widths: dict[int, int] = {}
        self.states = states

    def plan(self, new: int) -> None:
        self.layers.clear()
        if self.states is not None:
            self.states.plan(new)

    def attend(
        self, module: nn.Module, query_PHTD: Tensor, key_PKTD: Tensor, value_PKTD: Tensor, scoring: Scoring
    ) -> Tensor:
        """Plain causal attention [P, T, H, ·]. Tokens of a prompt never attend to the padding after it."""
        entries_PKTE, past = torch.cat([value_PKTD, key_PKTD], dim=-1), 0
        if self.before is not None:
            first_1KTE = self.before.layers[module.layer_idx]
            entries_PKTE = torch.cat([first_1KTE.expand(len(key_PKTD), -1, -1, -1), entries_PKTE], dim=2)
            value_PKTD, key_PKTD = entries_PKTE.split([value_PKTD.shape[-1], key_PKTD.shape[-1]], dim=-1)
            past = first_1KTE.shape[2]
        self.layers[module.layer_idx], self.value_widths[module.layer_idx] = entries_PKTE, value_PKTD.shape[-1]
        (scale, window, cap, sink), longest, mask = scoring, key_PKTD.shape[2], None
        if past or (window is not None and longest > window):
            ones = torch.ones(longest - past, longest, dtype=torch.bool, device=query_PHTD.device)
            mask = ones.tril(past).triu(past + 1 - (window or longest))[None, None]
        options = {"scaling": scale, "softcap": cap, "s_aux": sink, "is_causal": mask is None}
        if cap is None and sink is None:
            return sdpa(module, query_PHTD, key_PKTD, value_PKTD, mask, **options)[0]
        # One prompt after another, since all of its scores are in memory.
        prompts = zip(query_PHTD[:, None], key_PKTD[:, None], value_PKTD[:, None], strict=True)
        return torch.cat([sdpa(module, *prompt, mask, **options)[0] for prompt in prompts])

    def advance(self, lengths_P: Tensor) -> None:
        self.lengths = lengths_P

    def fan_out(self, group_size: int, capacity: int, longest_prompt: int = 0) -> RowCache | RowCaches:
        """The cache of P · G empty rows that continue these prompts, with room for `capacity` tokens each."""
        if not self.layers and self.states is None:
            raise ValueError("its layers do not attend through the attention interface of transformers")
        alike: dict[tuple[int, ...], list[int]] = {}  # layers by heads and widths
        for layer in sorted(self.layers):
            alike.setdefault((*self.layers[layer].shape, self.value_widths[layer]), []).append(layer)
        caches = [self._fan_out(layers, group_size, capacity) for layers in alike.values()]
        if self.states is not None:
            prompts = torch.arange(len(self.lengths), device=self.lengths.device)
            self.states.select(prompts.repeat_interleave(group_size))
            return RowCaches([*caches, self.states])
        return caches[0] if len(caches) == 1 else RowCaches(caches)

    def _fan_out(self, layers: list[int], group_size: int, capacity: int) -> RowCache:
        entries_LPKTE = torch.stack([self.layers[layer] for layer in layers])
        prompts, heads = entries_LPKTE.shape[1:3]
        device, count = entries_LPKTE.device, prompts * heads
        prefix = Prefix(
            entries_LPKTE.flatten(1, 2),
            self.lengths.repeat_interleave(heads),
            torch.arange(count, device=device).repeat_interleave(group_size),
        )
        latents = LatentCache.after(prefix, capacity, self.value_widths[layers[0]])
        slots = torch.arange(count * group_size, device=device).view(prompts, heads, group_size)
        return RowCache(latents, slots.transpose(1, 2).reshape(-1, heads), layers)


class RowCache:
    """Keys and values of the rows in layers that are alike. `slots_RK`: the place of each KV head of each row in the
    latent cache, which needs those of one prompt and attention head side by side, [P, K, G], while rows are [P, G]."""

    states: RowStates | None = None

    def __init__(self, latents: LatentCache, slots_RK: Tensor, layers: list[int]) -> None:
        self.latents, self.layers = latents, layers
        self._place(slots_RK)

    def _place(self, slots_RK: Tensor) -> None:
        self.slots_RK, self.order = slots_RK, slots_RK.flatten().argsort()

    def plan(self, new: int) -> None:
        self.latents.plan(new)

    def attend(
        self, module: nn.Module, query_RHSD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, scoring: Scoring
    ) -> Tensor:
        """Append the new tokens and attend, [R, S, H, ·]."""
        rows, heads = self.slots_RK.shape
        query_RKSND = (query_RHSD * scoring.scale).unflatten(1, (heads, -1)).transpose(2, 3)
        entries_RKSE = torch.cat([value_RKSD, key_RKSD], dim=-1)
        query, entries = (x.flatten(0, 1)[self.order] for x in (query_RKSND, entries_RKSE))
        if scoring.sink is not None:
            scoring = scoring._replace(sink=scoring.sink.view(heads, -1).repeat(rows, 1)[self.order])
        out = self.latents.attend(self.layers.index(module.layer_idx), query, entries, scoring)
        out_RKSNV = out[self.slots_RK.flatten()].unflatten(0, (rows, heads))
        return out_RKSNV.transpose(1, 2).flatten(2, 3)

    def advance(self, kept_R: Tensor) -> None:
        self.latents.advance(kept_R.repeat_interleave(self.slots_RK.shape[1])[self.order])

    def join(self, others: Sequence[RowCache], more: int | None = None) -> RowCache:
        """One cache with these rows and those of `others`; see LatentCache."""
        caches = [self, *others]
        before = accumulate((cache.slots_RK.numel() for cache in caches), initial=0)
        slots = [cache.slots_RK + count for cache, count in zip(caches, before, strict=False)]
        return RowCache(self.latents.join([cache.latents for cache in others], more), torch.cat(slots), self.layers)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in ascending order, and drop the others. A row that is named twice becomes two."""
        slots_RK = self.slots_RK[rows]
        slots, order = slots_RK.flatten().sort(stable=True)
        self.latents.select(slots)
        self._place(order.argsort().view_as(slots_RK))

    def take_rows(self, rows: Tensor, new: Tensor) -> RowCache:
        """A copy of these rows, in ascending order, for a forward of them alone. `put` brings them back."""
        slots_RK = self.slots_RK[rows]
        order = slots_RK.flatten().sort().values
        return RowCache(self.latents.take_rows(order), torch.searchsorted(order, slots_RK), self.layers)

    def excerpt(self, rows: Tensor) -> RowCache:
        slots_RK = self.slots_RK[rows]
        order = slots_RK.flatten().sort().values
        return RowCache(self.latents.excerpt(order), torch.searchsorted(order, slots_RK), self.layers)

    def cut(self, length: int) -> RowCache:
        return RowCache(self.latents.cut(length), self.slots_RK, self.layers)

    def put_rows(self, rows: Tensor, cache: RowCache) -> None:
        """The inverse of `take`."""
        self.latents.put_rows(self.slots_RK[rows].flatten().sort().values, cache.latents)


class RowCaches:
    """What is kept of the rows where layers differ in their heads, or in that some are recurrent: a `RowCache` for each
    shape, and `RowStates`, used alike."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = caches
        self.states = next((cache for cache in caches if isinstance(cache, RowStates)), None)
        self.of_layer = {layer: cache for cache in caches if cache is not self.states for layer in cache.layers}

    def plan(self, new: int) -> None:
        for cache in self.caches:
            cache.plan(new)

    def attend(self, module: nn.Module, *arguments: object) -> Tensor:
        return self.of_layer[module.layer_idx].attend(module, *arguments)

    def advance(self, kept_R: Tensor) -> None:
        for cache in self.caches:
            cache.advance(kept_R)

    def join(self, others: Sequence[RowCaches], *more: int) -> RowCaches:
        joined = []
        for place, cache in enumerate(self.caches):
            joined.append(cache.join([other.caches[place] for other in others], *more))
        return RowCaches(joined)

    def select(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.select(rows)

    def take_rows(self, rows: Tensor, new: Tensor) -> RowCaches:
        return RowCaches([cache.take_rows(rows, new) for cache in self.caches])

    def excerpt(self, rows: Tensor) -> RowCaches:
        return RowCaches([cache.excerpt(rows) for cache in self.caches])

    def cut(self, length: int) -> RowCaches:
        return RowCaches([cache.cut(length) for cache in self.caches])

    def put_rows(self, rows: Tensor, cache: RowCaches) -> None:
        for here, there in zip(self.caches, cache.caches, strict=True):
            here.put_rows(rows, there)


_CACHE: ContextVar[PromptCache | RowCache | RowCaches] = ContextVar("cache of the forward that runs")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if options.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds position_bias to its scores, which rollouts cannot do")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, sliding_window, options.get("softcap"), options.get("s_aux"))
    return _CACHE.get().attend(module, query, key, value, scoring), None


AttentionInterface.register(ATTENTION, _attend)


class HFTrunk:
    """The model for decoding. The policy must have plain weights; its parameters are cast to `dtype` in place."""

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        cast_parameters(policy.trunk, dtype)
        self.config, self.decoder, self.dtype = policy.config, policy.trunk.get_decoder(), dtype
        self.embedding = policy.trunk.get_input_embeddings().weight.detach()
        self.logits = policy.output.logits
        self.has_indexer, self.recurrent = has_indexer(policy.config), policy.recurrent
        self.can_go_on = not (self.has_indexer or self.recurrent)  # after a beginning that was read alone
        self.goes_on = policy.paths.rows == "packed"
        self.device: torch.device = self.embedding.device

    def cache(self, rows: int, capacity: int, prompts_R: Tensor | None = None) -> PromptCache:
        return PromptCache(RowStates(prompts_R, self.goes_on) if self.recurrent else None)

    def __call__(
        self, token_ids_BS: Tensor, position_ids_BS: Tensor, cache: PromptCache | RowCache | RowCaches
    ) -> Tensor:
        """Final hidden states [B, S, D], after the last norm."""
        rows, new = token_ids_BS.shape
        cache.plan(new)
        options: dict[str, Any] = {"position_ids": position_ids_BS, "use_cache": False}
        if self.recurrent:
            options["cache"] = cache.states
        if self.has_indexer:
            options["attention_mask"] = torch.ones(rows, 1, new, new, dtype=torch.bool, device=self.device)
        active = _CACHE.set(cache)
        try:
            with attending_by(self.config, ATTENTION):
                out = self.decoder(input_ids=token_ids_BS, **options)
        finally:
            _CACHE.reset(active)
        return out.last_hidden_state
