"""The MLA latent cache of a batch of rows: append, roll back, and one shared copy of every prompt.

Each cached token is one vector `[latent (kv_lora_rank) | rotated key (qk_rope_head_dim)]`, the same for all heads.
Axes: L layers, R rows, S new tokens a row, H heads, P prompts, E width of a cached vector, V its latent part.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Prefix:
    """Latents of P prompts, stored once and attended by every row that descends from them."""

    latents_LPTE: Tensor
    lengths_P: Tensor
    row_prompt_R: Tensor

    def __post_init__(self) -> None:
        # Rows of one prompt lie next to each other. Where prompts have unequal numbers of live rows, each gets
        # `widest` slots, so that one batched matrix product serves all rows of a prompt together.
        counts_P = torch.bincount(self.row_prompt_R, minlength=len(self.lengths_P))
        first_P = counts_P.cumsum(0) - counts_P
        self.widest = int(counts_P.max())
        rank_R = torch.arange(len(self.row_prompt_R), device=counts_P.device) - first_P[self.row_prompt_R]
        self.slots_R = self.row_prompt_R * self.widest + rank_R
        self.dense = len(self.row_prompt_R) == len(self.lengths_P) * self.widest
        self._visible: tuple[int, Tensor] | None = None

    def visible_RT(self, first: int) -> Tensor:
        """Which entries of its prompt each row may attend to: those from `first` on."""
        if self._visible is None or self._visible[0] != first:
            columns = torch.arange(self.latents_LPTE.shape[2], device=self.lengths_P.device)
            visible_PT = (columns < self.lengths_P[:, None]) & (columns >= first)
            self._visible = first, visible_PT[self.row_prompt_R]
        return self._visible[1]

    def by_prompt(self, x_RF: Tensor) -> Tensor:
        """[R, n, F] -> [P, widest * n, F], zeros in empty slots."""
        prompts, n = len(self.lengths_P), x_RF.shape[1]
        if not self.dense:
            padded = x_RF.new_zeros(prompts * self.widest, *x_RF.shape[1:])
            padded[self.slots_R] = x_RF
            x_RF = padded
        return x_RF.reshape(prompts, self.widest * n, -1)

    def by_row(self, x_PF: Tensor, n: int) -> Tensor:
        """The inverse of `by_prompt`."""
        x = x_PF.reshape(len(self.lengths_P) * self.widest, n, -1)
        return x if self.dense else x[self.slots_R]

    def join(self, others: Sequence[Prefix]) -> Prefix:
        prefixes = [self, *others]
        longest = max(prefix.latents_LPTE.shape[2] for prefix in prefixes)
        latents = [F.pad(p.latents_LPTE, (0, 0, 0, longest - p.latents_LPTE.shape[2])) for p in prefixes]
        before = accumulate((len(prefix.lengths_P) for prefix in prefixes), initial=0)
        return Prefix(
            torch.cat(latents, dim=1),
            torch.cat([prefix.lengths_P for prefix in prefixes]),
            torch.cat([p.row_prompt_R + count for p, count in zip(prefixes, before, strict=False)]),
        )

    def select(self, rows: Tensor) -> Prefix:
        alive, row_prompt_R = torch.unique(self.row_prompt_R[rows], return_inverse=True)
        if len(alive) == len(self.lengths_P):
            return Prefix(self.latents_LPTE, self.lengths_P, row_prompt_R)
        return Prefix(self.latents_LPTE[:, alive], self.lengths_P[alive], row_prompt_R)


class LatentCache:
    """A preallocated cache. `plan(S)` opens room for S tokens a row, the layers `attend`, and `advance(n)` keeps the
    first n of them; whatever lies behind a row's length is overwritten by the next plan, so a rollback is free.

    Every layer has a tensor of its own: where all are copied, no more than one exists twice.
    `first` hides the first entries of every prompt: an MTP head has no entry for a prompt's first token.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        capacity: int,
        width: int,
        value_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Prefix | None = None,
        first: int = 0,
    ) -> None:
        zeros = torch.zeros if prefix is None else _room  # a cache of prompts is filled at once
        shape = rows, capacity, width
        self.layers_RTE = [zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.value_width = value_width
        self.prefix = prefix
        self.first = first

    @property
    def rows(self) -> int:
        return len(self.lengths_R)

    @property
    def capacity(self) -> int:
        return self.layers_RTE[0].shape[1]

    def fan_out(self, group_size: int, capacity: int, longest_prompt: int = 0) -> LatentCache:
        """A new cache in which every row of this one is the shared prefix of `group_size` empty rows with room for
        `capacity` tokens. A group of one goes on in its prompt's own row, `longest_prompt` + `capacity` long."""
        prompts, _, width = self.layers_RTE[0].shape
        longest = int(self.lengths_R.max())
        if group_size == 1:
            self._copy([self], [slice(None)], capacity=max(longest, longest_prompt) + capacity)
            return self
        row_prompt_R = torch.arange(prompts, device=self.lengths_R.device).repeat_interleave(group_size)
        latents_LPTE = torch.stack([latents[:, :longest] for latents in self.layers_RTE])
        return LatentCache(
            len(self.layers_RTE),
            prompts * group_size,
            capacity,
            width,
            self.value_width,
            dtype=latents_LPTE.dtype,
            device=latents_LPTE.device,
            prefix=Prefix(latents_LPTE, self.lengths_R, row_prompt_R),
            first=self.first,
        )

    def plan(self, new: int) -> None:
        """Make room for `new` tokens a row behind each row's own length and fix who may attend to whom."""
        device = self.lengths_R.device
        steps_S = torch.arange(new, device=device)
        at_RS = self.lengths_R[:, None] + steps_S
        # In steps of sixteen: temporary tensors that grow with every token leave a gap in the heap with every token.
        self._reach = min(self.capacity, -(-(int(self.lengths_R.max()) + new) // 16) * 16)
        self._flat = (torch.arange(self.rows, device=device)[:, None] * self.capacity + at_RS).reshape(-1)
        columns = torch.arange(self._reach, device=device)
        visible = columns <= at_RS[..., None]
        if self.prefix is None and self.first:
            visible &= (columns >= self.first) | (columns == at_RS[..., None])
        if self.prefix is not None:
            shared = self.prefix.visible_RT(self.first)
            visible = torch.cat([shared[:, None].expand(-1, new, -1), visible], dim=-1)
        self._mask_RS1T = torch.where(visible, 0.0, -torch.inf)[:, :, None, :]

    def attend(self, layer: int, query_RSHK: Tensor, new_RSE: Tensor) -> Tensor:
        """Append the new tokens' vectors and attend; returns the attended latents [R, S, H, V].

        The key of a cached vector is its last K entries: the whole vector, or its rotated part alone where the
        policy has no unrotated key. The query already carries the softmax scale.
        """
        rows, new, heads, key_width = query_RSHK.shape
        own = self.layers_RTE[layer]
        own.view(-1, own.shape[-1]).index_copy_(0, self._flat, new_RSE.reshape(rows * new, -1))
        own = own[:, : self._reach]
        query = query_RSHK.reshape(rows, new * heads, key_width)
        scores = _scores(query, own[..., -key_width:])
        if self.prefix is not None:
            shared = self.prefix.latents_LPTE[layer]
            shared_scores = _scores(self.prefix.by_prompt(query), shared[..., -key_width:])
            scores = torch.cat([self.prefix.by_row(shared_scores, new * heads), scores], dim=-1)
        scores = scores.view(rows, new, heads, -1).float() + self._mask_RS1T
        weights = scores.softmax(-1).to(own.dtype).view(rows, new * heads, -1)
        values = weights[..., weights.shape[-1] - self._reach :] @ own[..., : self.value_width]
        if self.prefix is not None:
            shared_weights = self.prefix.by_prompt(weights[..., : shared.shape[1]])
            values = values + self.prefix.by_row(shared_weights @ shared[..., : self.value_width], new * heads)
        return values.view(rows, new, heads, self.value_width)

    def advance(self, kept_R: Tensor | int) -> None:
        self.lengths_R = self.lengths_R + kept_R

    def select(self, rows: Tensor) -> None:
        """Keep these rows (ascending) and forget the others, and the prompts that no row needs any more."""
        self._copy([self], [rows], capacity=self.capacity)
        if self.prefix is not None:
            self.prefix = self.prefix.select(rows)

    def join(self, others: Sequence[LatentCache]) -> LatentCache:
        """Take in the rows of `others`, which come from calls of `fan_out` with like arguments and are used up."""
        caches = [self, *others]
        prefixes = [cache.prefix for cache in others if cache.prefix is not None]
        self._copy(caches, [slice(None)] * len(caches), capacity=max(cache.capacity for cache in caches))
        if self.prefix is not None:
            self.prefix = self.prefix.join(prefixes)
        return self

    def _copy(self, caches: Sequence[LatentCache], rows: Sequence[Tensor | slice], *, capacity: int) -> None:
        """Become the given rows of `caches`, which lose theirs: layer by layer, and only what they hold."""
        lengths = [cache.lengths_R[chosen] for cache, chosen in zip(caches, rows, strict=True)]
        counts, reaches = [len(part) for part in lengths], [int(part.max()) for part in lengths]
        self.lengths_R = torch.cat(lengths)
        for layer, latents in enumerate(self.layers_RTE):
            shape = sum(counts), capacity, latents.shape[2]
            whole = _room(shape, dtype=latents.dtype, device=latents.device)
            for cache, chosen, part, reach in zip(caches, rows, whole.split(counts), reaches, strict=True):
                part[:, :reach] = cache.layers_RTE[layer][chosen, :reach]
                cache.layers_RTE[layer] = latents.new_empty(0)  # not a view, which would keep the whole
            self.layers_RTE[layer] = whole


def _room(shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not garbage: a masked entry has weight 0, and 0 · NaN would still be NaN. On a CPU they take no memory
    until they are written, and none when they are gone: most completions end before their limit."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _scores(query_BNK: Tensor, keys_BTK: Tensor) -> Tensor:
    """Every query against every key, [B, N, T]."""
    if keys_BTK.dtype == torch.bfloat16 and keys_BTK.device.type == "cpu":
        keys_BTK = keys_BTK.contiguous()  # a batch of strided bf16 keys costs five times its copy and product
    return query_BNK @ keys_BTK.transpose(1, 2)
