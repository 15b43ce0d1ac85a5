"""Attention of packed rows `[prompt | c1 | … | cG]`, or of trees, without the scores that a mask would discard, nor the
mask.

All kernels derive from `Packing` what attends to what:

    CPU                   blocks of scores, here
    CUDA                  torch's flex attention under a `BlockMask`, by transformers; see tiles.py
    what neither can do   torch's `sdpa`, or what the model brings, under a dense mask [B, 1, T, T]; so on other devices

On a CPU there is one block of scores for the keys of each branch, such as the prompt, in pieces of 2,048 queries.
Blocks are merged by the logarithms of their softmax's denominators, and the backward pass computes their weights again
from the merged ones, as FlashAttention does (Dao et al. 2022, sections 3.1 and B.2). Of the pairs of tokens in a row of
a 140-token prompt and eight completions of 64 tokens, 29 % are computed. Below float32 the scores are float32.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.flex_attention import compile_friendly_flex_attention, flex_attention_forward
from transformers.masking_utils import sdpa_mask

from policies import devices
from policies.scoring import capped, sdpa, with_sink
from policies.tiles import kernel_options, length_of, padded

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

ATTENTION = "sdpa_packed"
PROMPT_ATTENTION = "prompt_attention"  # a field of config.json that only we read
PIECE = 2048  # queries of a block; rows up to it have the same bits as without pieces
STRIP = 1024  # queries for which tiles are found at a time, a multiple of their 128
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # torch's mask_mod: row, attention head, query, key


def sees_prompts_whole(config: PretrainedConfig) -> bool:
    """Tells whether the tokens of a prompt attend to all of it."""
    return getattr(config, PROMPT_ATTENTION, "causal") == "bidirectional"


@contextmanager
def attending_by(config: PretrainedConfig, name: str) -> Iterator[None]:
    """The model of this configuration attends by the implementation `name` of transformers' registry meanwhile."""
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


@dataclass(frozen=True)
class Block:
    """The queries `queries` of a row attend to its tokens `keys`: query i to keys 0 … i + `ahead`.

    >>> Block(row=0, queries=slice(0, 9), keys=slice(0, 4))     # a prompt of 4 tokens, with 5 of its completions
    """

    row: int
    queries: slice
    keys: slice
    ahead: int = 0

    @property
    def pairs(self) -> int:
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)


@dataclass(frozen=True, eq=False)
class Packing:
    """All that the tokens of a micro-batch attend to, and what is derived from that in one forward pass.

    `segment` [B, T] is 0 in a prompt, 1 … G in its completions and below 0 in padding. A token attends to the prompt
    and to its own completion, up to itself; padding to itself too, since a softmax of nothing is NaN. Of a tree
    `segment` numbers the branches as they stand, each before those that go on from it, and `until` [B, T] is the last
    of these: a token attends to its own branch and to those that it goes on from. With `both_ways` a token of a prompt
    attends to all of it (a prefix-LM: Raffel et al. 2020, section 3.2.1). The first query is token `first`; Q = T −
    first.

    >>> Packing(torch.tensor([[0, 0, 1, 2, -1]])).visible[0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    >>> Packing(torch.tensor([[0, 0, 1]]), both_ways=True).visible[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    >>> Packing(torch.tensor([[0, 1, 2, 3]]), until=torch.tensor([[3, 2, 2, 3]])).visible[0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """

    segment: Tensor
    first: int = 0
    both_ways: bool = False
    window: int | None = None  # a token attends to so many of those before it, itself included, by their positions
    until: Tensor | None = None  # None: all branches go on from the prompt
    given: Packing | None = field(default=None, repr=False)  # the same with tensors of the host, where a caller has it
    placement: object = field(default=None, repr=False)  # see `Policy.placement`, where a caller has sent it
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)
    _windows: dict[int, Packing] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, Q and T."""
        rows, length = self.segment.shape
        return rows, length - self.first, length

    def within(self, window: int | None) -> Packing:
        """What is attended to by a layer whose window slides: the same where no row is longer than the window."""
        if window is None or self.segment.shape[1] <= window:
            return self
        if window not in self._windows:
            self._windows[window] = replace(self, window=window, _masks={}, _windows={})
        return self._windows[window]

    @cached_property
    def on_host(self) -> Packing:
        """Return this packing with tensors of the host. If none were `given`, this waits for the device."""
        if self.given is not None or self.segment.device.type == "cpu":
            return self.given or self
        segment, ends = torch.stack([self.segment, self.ends]).cpu()
        return replace(self, segment=segment, until=ends, _masks={}, _windows={})

    @cached_property
    def ends(self) -> Tensor:
        """[B, T] the last branch that goes on from that of each token."""
        if self.until is not None:
            return self.until
        return self.segment.where(self.segment != 0, self.segment.amax(1, keepdim=True).clamp(min=0))

    @cached_property
    def positions(self) -> Tensor:
        """[B, T] the place of a token among those that are read up to it."""
        number, ends = self.segment.clamp(min=0), self.ends[:, None]
        place = torch.arange(number.shape[1], device=number.device).expand_as(number)
        count = int(self.on_host.segment.max().clamp(min=0)) + 1
        branches = torch.arange(count, device=number.device)[:, None]
        begins = place.new_full((len(number), len(branches)), number.shape[1])
        begins = begins.scatter_reduce(1, number, place, "amin")
        above = (self.segment[:, None] >= 0) & (self.segment[:, None] < branches) & (branches <= ends)
        return place - begins.gather(1, number) + above.sum(2).gather(1, number)

    @property
    def longest(self) -> int:
        """The most tokens that are read up to one of them, itself included."""
        return int(self.positions.where(self.segment >= 0, -1).max()) + 1

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks of the kernel on a CPU. Every token is a query of one block or of two, and padding of none."""
        blocks: list[Block] = []
        for row, numbers in enumerate(self.on_host.segment.tolist()):
            blocks += self._row(row, numbers, self.on_host.ends[row].tolist())
        return blocks

    def _row(self, row: int, numbers: list[int], ends: list[int]) -> Iterator[Block]:
        length = max((n for n, number in enumerate(numbers, start=1) if number >= 0), default=0)
        start = 0
        for number, run in groupby(numbers):
            stop = start + len(list(run))
            if number >= 0:
                last = bisect_right(numbers, ends[start], stop, length)
                for at in range(max(start, self.first), last, PIECE):
                    upto = min(at + PIECE, last)
                    whole = self.both_ways and number == 0
                    queries = slice(at - self.first, upto - self.first)
                    keys = slice(start, stop if whole else min(stop, upto))
                    yield Block(row, queries, keys, stop - start if whole else at - start)
            start = stop

    @cached_property
    def pays(self) -> bool:
        """Tells whether blocks are faster than a mask. They need more operators and compute the scores twice, so they
        pay if they spare half of the pairs (measured), and where rows are so long that a mask is large."""
        rows, queries, length = self.shape
        return length > PIECE or sum(block.pairs for block in self.blocks) <= rows * queries * length / 2

    @cached_property
    def padded(self) -> Packing:
        """The same packing with so much padding that flex attention is compiled for few lengths."""
        more = length_of(self.shape[1]) - self.shape[1]
        segment, until = (F.pad(of_token, (0, more), value=-1) for of_token in (self.segment, self.ends))
        given = None if self.given is None else self.given.padded
        return replace(self, segment=segment, until=until, given=given, _masks={}, _windows={})

    @cached_property
    def tiles(self) -> BlockMask:
        """The tiles of 128 queries and 128 keys that flex attention computes, and which of them in part.

        A few rows of tiles are looked for at a time, since torch looks at every pair of tokens for that.
        """
        rows, queries, length = self.shape
        parts = [
            create_block_mask(
                self.sees_from(at), rows, None, min(STRIP, queries - at), length, device=self.segment.device
            )
            for at in range(0, queries, STRIP)
        ]
        joined = []
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            joined.append(torch.cat([getattr(part, name) for part in parts], dim=2))
        return BlockMask.from_kv_blocks(*joined, mask_mod=self.sees_from(0), seq_lengths=(queries, length))

    def sees_from(self, query: int) -> Sees:
        """Says whether a token of a row [b] is attended to [k] by a query [q] that is counted from `query`, by any
        head [h]. All that differs between micro-batches is in tensors. Else a kernel would be compiled for each."""
        segment, ends = self.segment, self.ends
        first = torch.full((), self.first + query, device=segment.device)
        both_ways, window = self.both_ways, self.window
        positions = None if window is None else self.positions

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q = q + first
            of_query, of_key = segment[b, q], segment[b, k]
            goes_on = (of_key <= of_query) & (of_query <= ends[b, k])
            seen = (goes_on | (of_key == 0)) & (of_key >= 0) & (k <= q) | (k == q)
            if positions is not None:
                seen = seen & (positions[b, q] - positions[b, k] < window)
            return seen | ((of_key == 0) & (of_query == 0)) if both_ways else seen

        return sees

    @property
    def visible(self) -> Tensor:
        """The mask [B, Q, T], true where a query attends to a token."""
        rows, queries, length = self.shape
        return _visible(self.sees_from(0), (rows, 1, queries, length), self.segment.device)[:, 0]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """The mask [B, 1, Q, T], 0 where a query attends to a token and the lowest number elsewhere."""
        if dtype not in self._masks:
            self._masks[dtype] = _additive(self.visible[:, None], dtype)
        return self._masks[dtype]

    def mask_for(self, implementation: str | None, dtype: torch.dtype) -> Tensor | BlockMask:
        """The mask that a model of transformers gets: the dense one where no kernel of `attend` spares it.

        transformers hands a `BlockMask` on as it is. The kernel on a CPU reads blocks, so there it is one tile in part.
        """
        if implementation == ATTENTION and _by_tiles(self.segment):
            return self.padded.tiles
        if implementation == ATTENTION and self.segment.device.type == "cpu" and self.pays:
            rows, queries, length = self.shape
            one, place = torch.ones(rows, 1, 1, dtype=torch.int32), torch.zeros(rows, 1, 1, 1, dtype=torch.int32)
            sizes: dict[str, Any] = {"BLOCK_SIZE": (queries, length), "seq_lengths": (queries, length)}
            return BlockMask.from_kv_blocks(one, place, mask_mod=self.sees_from(0), compute_q_blocks=False, **sizes)
        return self.mask(dtype)


def _visible(sees: Sees, shape: Sequence[int], device: torch.device) -> Tensor:
    """Says of each query and token of `shape` [B, 1, Q, T] whether the one attends to the other."""
    b, h, q, k = (torch.arange(size, device=device) for size in shape)
    return sees(b[:, None, None, None], h[:, None, None], q[:, None], k)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _by_tiles(tensor: Tensor) -> bool:
    return devices.has_cuda(tensor.device)


def _options(query: Tensor, value: Tensor) -> dict[str, int] | None:
    """The options of flex attention's kernels for such tensors; None where it cannot train on their device."""
    kind = query.device, query.dtype, query.shape[-1], value.shape[-1]
    return kernel_options(compile_friendly_flex_attention, *kind) if _by_tiles(query) else None


class _PackedAttention(torch.autograd.Function):
    """The kernel on a CPU, see the top of this file."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        k, v = _for_every_head(query, key, value)
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(*query.shape[:3], v.shape[-1], dtype=wide)
        total = query.new_full(query.shape[:3], -torch.inf, dtype=wide)  # logarithms of the denominators so far
        for block in packing.blocks:
            scores_HQK = _scores(query, k, block, scale, cap)
            here, before = _at(out, block), _at(total, block)
            after = torch.logaddexp(before, scores_HQK.logsumexp(-1))
            weights = scores_HQK.sub_(after[..., None]).exp_().to(v.dtype)
            here.mul_((before - after).exp_()[..., None]).add_(weights @ v[block.row, :, block.keys])
            before.copy_(after)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.packing, ctx.scale, ctx.cap = packing, scale, cap
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        k, v = _for_every_head(query, key, value)
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (query, k, v))
        along = (grad * out).sum(-1, dtype=total.dtype)
        along = along if grad_total is None else along - grad_total
        for block in ctx.packing.blocks:
            scores_HQK = _scores(query, k, block, ctx.scale, ctx.cap)
            slope = None if ctx.cap is None else 1 - (scores_HQK.clamp(min=-ctx.cap) / ctx.cap) ** 2
            weights_HQK = scores_HQK.sub_(_at(total, block)[..., None]).exp_()
            g, (k_here, v_here) = _at(grad, block), (x[block.row, :, block.keys] for x in (k, v))
            of_v[block.row, :, block.keys] += weights_HQK.to(v.dtype).transpose(1, 2) @ g
            weights_HQK *= (g @ v_here.transpose(1, 2)) - _at(along, block)[..., None]
            of_scores = weights_HQK.mul_(ctx.scale if slope is None else ctx.scale * slope).to(k.dtype)
            _at(of_q, block).add_(of_scores @ k_here)
            of_k[block.row, :, block.keys] += of_scores.transpose(1, 2) @ _at(query, block)
        of_k, of_v = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (of_k, of_v))
        return of_q, of_k, of_v, None, None, None


def _at(x_BHT: Tensor, block: Block) -> Tensor:
    return x_BHT[block.row, :, block.queries]


def _scores(query: Tensor, key: Tensor, block: Block, scale: float, cap: float | None) -> Tensor:
    """Computes [H, queries, keys] in float32 or above, -inf for keys after their query."""
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key[block.row, :, block.keys].to(wide)
    scores = capped((_at(query, block).to(wide) @ keys.transpose(1, 2)).mul_(scale), cap)
    some = scores[:, : max(keys.shape[1] - 1 - block.ahead, 0)]  # the queries that do not see all of the keys
    later = torch.ones(some.shape[1:], dtype=torch.bool, device=key.device).triu_(1 + block.ahead)
    some.masked_fill_(later, -torch.inf)
    return scores


def _for_every_head(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return [x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (key, value)]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attends by queries [B, H, Q, K] to keys [B, h, T, K] and values [B, h, T, V]; h divides H. Returns [B, Q, H, V],
    and [B, H, Q], the logarithm of the softmax's denominator, by which more keys can be merged.

    Both are differentiable. For padding they are those of its own key, or by blocks zero and minus infinity. With `cap`
    c a score s becomes c tanh(s / c), on a CPU only.
    """
    kernel = _options(query, value)
    if kernel is not None:
        tiles, queries = packing.padded.tiles, query.shape[2]
        options: dict[str, Any] = {"scale": scale, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
        tensors = padded(tiles, query, key, value)
        out, aux = compile_friendly_flex_attention(*tensors, block_mask=tiles, kernel_options=kernel, **options)
        out, total = out[:, :, :queries, : value.shape[-1]], aux.lse[:, :, :queries]
    else:
        out, total = _PackedAttention.apply(query, key, value, packing, scale, cap)
    return out.transpose(1, 2), total


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends [B, T, H, V]: packed rows by the kernel of their device, all else by transformers' `sdpa` under a mask.

    `Packing.mask_for` gives the mask. The `packing` is among the options of a model that hands it on; any other model
    makes the dense mask for every layer. `head_weights` [B, T, H] there weigh the attention heads, see heads.py.
    """
    packing: Packing | None = options.pop("packing", None)
    if packing is not None and (windowed := packing.within(options.get("sliding_window"))) is not packing:
        packing = windowed
        attention_mask = packing.mask_for(ATTENTION if _by_tiles(query) else None, query.dtype)
    head_weights: Tensor | None = options.pop("head_weights", None)
    if head_weights is not None:
        out, total = attend(module, query, key, value, attention_mask, scaling, dropout, packing=packing, **options)
        return out * head_weights[..., None].to(out.dtype), total
    cap, sink, bias = (options.get(name) for name in ("softcap", "s_aux", "position_bias"))  # of a few models
    if isinstance(attention_mask, BlockMask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        kernel = None if dropout or bias is not None else _options(query, value)
        if kernel is not None:
            tensors = padded(attention_mask, query, key, value)
            how: dict[str, Any] = options | {"scaling": scale, "kernel_options": kernel}
            out, total = flex_attention_forward(module, *tensors, attention_mask, **how)
            return out[:, : query.shape[2], :, : value.shape[-1]], total
        if packing is not None and not (_by_tiles(query) or dropout) and bias is None:
            out, total = packed_attention(query, key, value, packing, scale, cap)
            return out if sink is None else with_sink(out, total.transpose(1, 2)[..., None], sink[:, None])[0], None
        if packing is None:
            shape = (*attention_mask.shape[:2], query.shape[2], key.shape[2])
            visible = _visible(attention_mask.mask_mod, shape, query.device)
        attention_mask = packing.mask(query.dtype) if packing else _additive(visible, query.dtype)
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
