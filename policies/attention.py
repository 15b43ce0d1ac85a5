"""Attention of packed rows `[prompt | c1 | … | cG]` on a CPU, without the scores that a mask would discard.

Every token attends to its prompt, and one of a completion also to the tokens before it there: this is one block of
scores for the prompt's keys and one for each completion. Blocks are merged by the logarithms of their softmax's
denominators, and the backward pass computes their weights again from the merged ones, as FlashAttention does (Dao et
al. 2022, sections 3.1 and B.2). Of the 425,000 pairs of tokens in a row of a 140-token prompt and eight completions of
64 tokens, 124,000 are computed. Below float32 the scores are float32, and other products have the tensors' precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_packed"
BEYOND = ("softcap", "s_aux", "position_bias")  # some models add these to their scores


@dataclass(frozen=True)
class Block:
    """The tokens `queries` of a row attend to its tokens `keys`: token i of the queries to 0 … i of the keys.

    >>> Block(row=0, queries=slice(0, 9), keys=slice(0, 4))     # a prompt of 4 tokens, with 5 of its completions
    """

    row: int
    queries: slice
    keys: slice

    @property
    def pairs(self) -> int:
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)


@dataclass(frozen=True)
class Packing:
    """All that the tokens of a micro-batch [B, T] attend to. Every token is a query of one block or of two."""

    shape: tuple[int, int]
    blocks: Sequence[Block]

    @cached_property
    def pays(self) -> bool:
        """Blocks need more operators and compute the scores twice, so they pay if they spare half of the pairs
        (measured). With one completion in each row they spare too few."""
        rows, length = self.shape
        return sum(block.pairs for block in self.blocks) <= rows * length**2 / 2


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        k, v = _for_every_head(query, key, value)
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(*query.shape[:3], v.shape[-1], dtype=wide)
        total = query.new_full(query.shape[:3], -torch.inf, dtype=wide)  # logarithms of the denominators so far
        for block in packing.blocks:
            scores_HQK = _scores(query, k, block, scale)
            here, before = _at(out, block), _at(total, block)
            after = torch.logaddexp(before, scores_HQK.logsumexp(-1))
            weights = scores_HQK.sub_(after[..., None]).exp_().to(v.dtype)
            here.mul_((before - after).exp_()[..., None]).add_(weights @ v[block.row, :, block.keys])
            before.copy_(after)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        k, v = _for_every_head(query, key, value)
        of_q, of_k, of_v = (torch.zeros_like(x) for x in (query, k, v))
        along = (grad * out).sum(-1, dtype=total.dtype)
        for block in ctx.packing.blocks:
            weights_HQK = _scores(query, k, block, ctx.scale).sub_(_at(total, block)[..., None]).exp_()
            g, (k_here, v_here) = _at(grad, block), (x[block.row, :, block.keys] for x in (k, v))
            of_v[block.row, :, block.keys] += weights_HQK.to(v.dtype).transpose(1, 2) @ g
            weights_HQK *= (g @ v_here.transpose(1, 2)) - _at(along, block)[..., None]
            of_scores = weights_HQK.mul_(ctx.scale).to(k.dtype)
            _at(of_q, block).add_(of_scores @ k_here)
            of_k[block.row, :, block.keys] += of_scores.transpose(1, 2) @ _at(query, block)
        of_k, of_v = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (of_k, of_v))
        return of_q, of_k, of_v, None, None


def _at(x_BHT: Tensor, block: Block) -> Tensor:
    return x_BHT[block.row, :, block.queries]


def _scores(query: Tensor, key: Tensor, block: Block, scale: float) -> Tensor:
    """[H, queries, keys] in float32 or above, -inf for keys after their query."""
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key[block.row, :, block.keys].to(wide)
    scores = (_at(query, block).to(wide) @ keys.transpose(1, 2)).mul_(scale)
    later = torch.ones(2 * keys.shape[1:2], dtype=torch.bool, device=key.device).triu_(1)
    scores[:, : keys.shape[1]].masked_fill_(later, -torch.inf)
    return scores


def _for_every_head(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return [x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (key, value)]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Queries [B, H, T, K], keys [B, h, T, K] and values [B, h, T, V] -> [B, T, H, V], zero at padding; h divides H.

    It is differentiable.
    """
    out: Tensor = _PackedAttention.apply(query, key, value, packing, scale)
    return out.transpose(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, V]: transformers' `sdpa` under `attention_mask`, or `packed_attention` if `packing` can be used."""
    beyond = dropout or any(options.get(name) is not None for name in BEYOND)
    if packing is None or query.device.type != "cpu" or beyond or not packing.pays:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, packing, scale), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
