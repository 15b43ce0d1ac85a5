"""The MLA latent cache of a batch of rows, with appending, rollback and one shared copy of every prompt.

Each cached token is one vector `[latent (kv_lora_rank) | rotated key (qk_rope_head_dim)]`, the same for all heads.
Axes: L layers, R rows, S new tokens a row, H heads, P prompts, E width of a cached vector, V its latent part.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding.kernels import attention
from policies.scoring import PLAIN, Scoring, with_sink


@dataclass
class Prefix:
    """Latents of P prompts, which are stored once and attended to by all rows that continue them."""

    latents_LPTE: Tensor
    lengths_P: Tensor
    row_prompt_R: Tensor

    def __post_init__(self) -> None:
        # Rows of one prompt are neighbours. If prompts have unequal numbers of live rows, each gets `widest` slots, so
        # that one batched matrix product serves all rows of a prompt together.
        counts_P = torch.bincount(self.row_prompt_R, minlength=len(self.lengths_P))
        first_P = counts_P.cumsum(0) - counts_P
        self.widest = int(counts_P.max())
        rank_R = torch.arange(len(self.row_prompt_R), device=counts_P.device) - first_P[self.row_prompt_R]
        self.slots_R = self.row_prompt_R * self.widest + rank_R
        self.dense = len(self.row_prompt_R) == len(self.lengths_P) * self.widest
        self._mask: tuple[int, Tensor] | None = None

    @property
    def longest(self) -> int:
        """Entries of a prompt, padding included."""
        return self.latents_LPTE.shape[2]

    def mask_P1T(self, first: int) -> Tensor:
        """The mask that is -inf at the entries of a prompt to which its rows may not attend: those before `first`, and
        padding."""
        if self._mask is None or self._mask[0] != first:
            columns = torch.arange(self.latents_LPTE.shape[2], device=self.lengths_P.device)
            visible_PT = (columns < self.lengths_P[:, None]) & (columns >= first)
            self._mask = first, _mask(visible_PT, self.latents_LPTE.dtype)[:, None]
        return self._mask[1]

    def by_prompt(self, x_RF: Tensor) -> Tensor:
        """Arranges [R, n, F] as [P, widest * n, F], with zeros in empty slots."""
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
        """One prefix with these prompts, and then those of `others`."""
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
        """The prefix of these rows alone, without prompts that none of them continues."""
        alive, row_prompt_R = torch.unique(self.row_prompt_R[rows], return_inverse=True)
        if len(alive) == len(self.lengths_P):
            return Prefix(self.latents_LPTE, self.lengths_P, row_prompt_R)
        return Prefix(self.latents_LPTE[:, alive], self.lengths_P[alive], row_prompt_R)

    def excerpt(self, rows: Tensor) -> Prefix:
        """Copies the prefix of these rows alone, without the padding that longer prompts needed."""
        prefix = self.select(rows)
        prefix.latents_LPTE = prefix.latents_LPTE[:, :, : int(prefix.lengths_P.max())].clone()
        return prefix


class LatentCache:
    """A preallocated cache. `plan(S)` makes room for S tokens in each row, the layers `attend`, and `advance(n)` keeps
    the first n of them. The next plan overwrites what comes after a row's length, so a rollback costs nothing.

    `shape` is (layers, rows, entries of a row, E). Every layer has a tensor of its own, so that only one at a time
    exists twice while all are copied. There may be more places than rows (see compiled/rounds.py); the last of them are
    empty then. `first` hides the first entries of every prompt, since a draft head has no entry for a prompt's first
    token. `whole_R`, where it is set: lengths of prompts that the next plan reads, whose tokens see each other.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        value_width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        prefix: Prefix | None = None,
        first: int = 0,
    ) -> None:
        layers, *of_layer = shape
        zeros = torch.zeros if prefix is None else room  # the cache of prompts is filled at once
        self.layers_RTE = [zeros(of_layer, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths_R = torch.zeros(shape[1], dtype=torch.long, device=device)
        self.known_longest: int | None = 0  # the largest of them, where the host knows it
        self.value_width = value_width
        self.prefix = prefix
        self.first = first
        self.whole_R: Tensor | None = None
        self._ranges_of: tuple[int, int, int] | None = None

    @classmethod
    def after(cls, prefix: Prefix, capacity: int, value_width: int, first: int = 0) -> LatentCache:
        """The empty cache of the rows that continue `prefix`."""
        latents = prefix.latents_LPTE
        shape = len(latents), len(prefix.row_prompt_R), capacity, latents.shape[-1]
        return cls(shape, value_width, dtype=latents.dtype, device=latents.device, prefix=prefix, first=first)

    @property
    def rows(self) -> int:
        return len(self.lengths_R)

    @property
    def capacity(self) -> int:
        """Tells how many entries a row has room for."""
        return self.layers_RTE[0].shape[1]

    @property
    def longest(self) -> int:
        """Tells how many entries the row with the most has; the device is asked where the host does not know."""
        if self.known_longest is None:
            self.known_longest = int(self.lengths_R.max())
        return self.known_longest

    def fan_out(self, group_size: int, capacity: int, longest_prompt: int = 0) -> LatentCache:
        """A new cache in which every row of this one is the shared prefix of `group_size` empty rows with room for
        `capacity` tokens. A group of one continues in its prompt's own row, `longest_prompt` + `capacity` long."""
        longest = self.longest
        if group_size == 1:
            self._copy([self], [slice(None)], capacity=max(longest, longest_prompt) + capacity)
            return self
        row_prompt_R = torch.arange(self.rows, device=self.lengths_R.device).repeat_interleave(group_size)
        latents_LPTE = torch.stack([latents[:, :longest] for latents in self.layers_RTE])
        prefix = Prefix(latents_LPTE, self.lengths_R, row_prompt_R)
        return LatentCache.after(prefix, capacity, self.value_width, self.first)

    def plan(self, new: int) -> None:
        """Make room for `new` tokens after each row's own length, and compute the masks.

        A row may get more tokens than it has room for, if it has ended or is about to while others still read many.
        Those past its room go to its last entry and never into the next row, so the row must not keep that entry.
        """
        ranges, starts_R1 = self._ranges(new)
        at_RS = (self.lengths_R[:, None] + ranges[:new]).clamp(max=self.capacity - 1)
        # In steps of sixteen: temporary tensors that grow with every token leave gaps in the heap.
        self._reach = min(self.capacity, -(-(self.longest + new) // 16) * 16)
        self._flat = (starts_R1 + at_RS).reshape(-1)
        columns = ranges[: self._reach]
        visible = columns <= at_RS[..., None]
        if self.whole_R is not None:
            visible |= columns < self.whole_R[:, None, None]
            self.whole_R = None  # what comes after the prompt is causal
        if self.prefix is None and self.first:
            visible &= (columns >= self.first) | (columns == at_RS[..., None])
        self._at_RS, self._visible = at_RS, visible
        self._mask_RST = _mask(visible, self.layers_RTE[0].dtype)
        self._mask_RNT: Tensor | None = None  # the same for every attention head; made when their number is known
        self._windows: dict[int, tuple[Tensor, Tensor | None]] = {}  # the masks of layers whose window slides

    def _ranges(self, new: int) -> tuple[Tensor, Tensor]:
        """Gives the numbers from 0 on, as many as a plan needs, and where each row begins in the entries [R, 1]. They
        stay the same from plan to plan."""
        shape = self.rows, self.capacity, max(new, self.capacity)
        if self._ranges_of != shape:
            device = self.lengths_R.device
            rows = torch.arange(self.rows, device=device)[:, None]
            self._ranges_of, self._kept_ranges = shape, (torch.arange(shape[2], device=device), rows * self.capacity)
        return self._kept_ranges

    def attend(self, layer: int, query_RSHK: Tensor, new_RSE: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """Append the new tokens' vectors and attend; returns the attended latents [R, S, H, V]. A sink is [R, H] here.

        The key of a cached vector is its last K entries: the whole vector, or only its rotated part if the policy has
        no unrotated key. The query includes the softmax scale already.
        """
        (rows, new, heads, key_width), (_, window, cap, sink) = query_RSHK.shape, scoring
        latents_RTE = self.layers_RTE[layer]
        latents_RTE.view(-1, latents_RTE.shape[-1]).index_copy_(0, self._flat, new_RSE.reshape(rows * new, -1))
        query = query_RSHK.reshape(rows, new * heads, key_width)
        if self._mask_RNT is None:
            self._mask_RNT = self._mask_RST[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)
        mask_RNT, of_prefix = self._mask_RNT, None
        if window is not None and window < self._reach + (0 if self.prefix is None else self.prefix.longest):
            mask_RNT, of_prefix = self._masks_within(window, heads)
        out, total = attention(query, latents_RTE[:rows, : self._reach], self.value_width, mask_RNT, cap)
        if sink is not None:
            out, total = with_sink(out, total, sink.repeat(1, new)[..., None])
        if self.prefix is not None:
            latents = self.prefix.latents_LPTE[layer]
            mask = self.prefix.mask_P1T(self.first) if of_prefix is None else of_prefix
            shared_out, shared_total = attention(self.prefix.by_prompt(query), latents, self.value_width, mask, cap)
            if self.first:  # in a prompt of one token nothing is visible
                shared_total = shared_total + mask.amax(-1, keepdim=True)
            shared_out, shared_total = (self.prefix.by_row(x, new * heads) for x in (shared_out, shared_total))
            share = torch.sigmoid(shared_total - total)  # of the prompt in the softmax over both
            out = torch.lerp(out, shared_out, share.to(out.dtype))
        return out.reshape(rows, new, heads, self.value_width)

    def _masks_within(self, window: int, heads: int) -> tuple[Tensor, Tensor | None]:
        """Gives the masks of the rows' entries [R, N, T] and of their prompts' [P, N, T]. A prompt that a window has
        passed is masked by a low number: of minus infinity everywhere a kernel would make NaN."""
        if window not in self._windows:
            at_RS1, dtype = self._at_RS[..., None], self.layers_RTE[0].dtype
            columns = torch.arange(self._reach, device=at_RS1.device)
            own = _mask(self._visible & (columns > at_RS1 - window), dtype)
            of_prefix = None
            if self.prefix is not None:
                first_RS1 = self.prefix.lengths_P[self.prefix.row_prompt_R][:, None, None] + at_RS1 - window + 1
                columns = torch.arange(self.prefix.longest, device=at_RS1.device)
                hidden = (columns < first_RS1)[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)
                lowest = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
                lowest = lowest.masked_fill_(hidden, torch.finfo(dtype).min / 2)
                of_prefix = self.prefix.by_prompt(lowest) + self.prefix.mask_P1T(self.first)
            self._windows[window] = own[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2), of_prefix
        return self._windows[window]

    def advance(self, kept_R: Tensor | int, longest: int | None = None) -> None:
        """Keep the first `kept_R` of the tokens that were planned. `longest` is what that makes it, where known."""
        if isinstance(kept_R, int) and self.known_longest is not None:
            longest = self.known_longest + kept_R
        self.lengths_R, self.known_longest = self.lengths_R + kept_R, longest

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in ascending order; drop the others, and prompts that no row needs any more. A row that is
        named twice becomes two."""
        self._copy([self], [rows], capacity=self.capacity)
        if self.prefix is not None:
            self.prefix = self.prefix.select(rows)

    def take_rows(self, rows: Tensor, new: Tensor | None = None) -> LatentCache:
        """A copy of these rows, in ascending order, for a forward of them alone. `put` brings them back."""
        cache, reach = copy.copy(self), int(self.lengths_R[rows].max())
        cache.lengths_R, cache.known_longest, cache.layers_RTE = self.lengths_R[rows], reach, []
        cache.prefix = None if self.prefix is None else self.prefix.select(rows)
        for latents in self.layers_RTE:
            part = room((len(rows), *latents.shape[1:]), dtype=latents.dtype, device=latents.device)
            part[:, :reach] = latents[rows, :reach]
            cache.layers_RTE.append(part)
        return cache

    def put_rows(self, rows: Tensor, cache: LatentCache) -> None:
        """The inverse of `take`: these rows become what they are there."""
        reach = cache.longest
        self.lengths_R, self.known_longest = self.lengths_R.index_copy(0, rows, cache.lengths_R), None
        for latents, part in zip(self.layers_RTE, cache.layers_RTE, strict=True):
            latents[rows, :reach] = part[:, :reach]

    def excerpt(self, rows: Tensor) -> LatentCache:
        """A copy of these rows, in ascending order, without room for more. `cut` and `join` go on with it."""
        prefix, reach = None if self.prefix is None else self.prefix.excerpt(rows), int(self.lengths_R[rows].max())
        alike = {"dtype": self.layers_RTE[0].dtype, "device": self.lengths_R.device, "first": self.first}
        cache = LatentCache((0, len(rows), 0, 0), self.value_width, prefix=prefix, **alike)
        cache.layers_RTE = [latents[rows, :reach] for latents in self.layers_RTE]
        cache.lengths_R, cache.known_longest = self.lengths_R[rows], reach
        return cache

    def cut(self, length: int) -> LatentCache:
        """The first `length` entries of every row, those of its prompt included, for a `join`, which copies them."""
        cache, prefix, lengths_R = copy.copy(self), self.prefix, torch.full_like(self.lengths_R, length)
        if prefix is not None:
            lengths_P = prefix.lengths_P.clamp(max=length)
            cache.prefix = Prefix(prefix.latents_LPTE, lengths_P, prefix.row_prompt_R)
            lengths_R = lengths_R - lengths_P[prefix.row_prompt_R]
        cache.layers_RTE, cache.lengths_R, cache.known_longest = [*self.layers_RTE], lengths_R, None
        return cache

    def join(self, others: Sequence[LatentCache], more: int | None = None) -> LatentCache:
        """Add the rows of `others`, which come from calls of `fan_out` with like arguments and lose their rows; or, of
        caches that were `cut`, with room for so many `more` tokens in each row."""
        caches = [self, *others]
        prefixes = [cache.prefix for cache in others if cache.prefix is not None]
        rooms = [cache.capacity if more is None else cache.longest + more for cache in caches]
        self._copy(caches, [slice(None)] * len(caches), capacity=max(rooms))
        if self.prefix is not None:
            self.prefix = self.prefix.join(prefixes)
        return self

    def _copy(self, caches: Sequence[LatentCache], rows: Sequence[Tensor | slice], *, capacity: int) -> None:
        """Become the given rows of `caches`, layer by layer and without unused entries; `caches` lose their rows."""
        lengths = [cache.lengths_R[chosen] for cache, chosen in zip(caches, rows, strict=True)]
        counts, reaches = [len(part) for part in lengths], [int(part.max()) for part in lengths]
        for layer, latents in enumerate(self.layers_RTE):
            shape = sum(counts), capacity, latents.shape[2]
            whole = room(shape, dtype=latents.dtype, device=latents.device)
            for cache, chosen, part, reach in zip(caches, rows, whole.split(counts), reaches, strict=True):
                part[:, :reach] = cache.layers_RTE[layer][: cache.rows][chosen, :reach]
                cache.layers_RTE[layer] = latents.new_empty(0)  # a view would keep the whole tensor
            self.layers_RTE[layer] = whole
        self.lengths_R, self.known_longest = torch.cat(lengths), max(reaches)


def room(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes zeros, since a masked entry has weight 0, and 0 · NaN would be NaN. On a CPU they take no memory until they
    are written, and free it at once: most completions end before their limit."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
