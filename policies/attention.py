"""Attention of packed rows `[prompt | c1 | … | cG]` on a CPU, without the scores that a mask would throw away.

Every token attends to its prompt, a completion's also to those before it in the completion. So there are two products:
all queries against the prompt's keys, and each completion against itself. They are merged by the logarithms of their
softmax's denominators, as FlashAttention merges its blocks (Dao et al. 2022, section 3.1), and the backward pass of
either block needs nothing but the merged result. Of the 425,000 pairs of tokens in a row of a 140-token prompt and
eight completions of 64 tokens, 124,000 are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_packed"
BEYOND = ("softcap", "s_aux", "position_bias")  # what some models add to their scores

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Packing:
    """Where prompts and completions lie. Axes: B rows, T tokens of a row, P of the longest prompt, C completions,
    L tokens of the longest, H heads.

    >>> Packing(length=6, prompt_lengths_B=[2], row_C=[0, 0], start_C=[2, 4], lengths_C=[2, 1])     # 7 8 | 1 2 | 3 | -
    """

    length: int  # T
    prompt_lengths_B: Tensor
    row_C: Tensor
    start_C: Tensor
    lengths_C: Tensor

    @cached_property
    def pays(self) -> bool:
        """A pair of tokens costs the fused kernel twice what it costs plain products (measured), so half of them
        must be spared. One completion a row spares too few."""
        rows, completions = len(self.prompt_lengths_B), len(self.row_C)
        pairs = rows * self.length * self.prompt.stop + completions * self.real_CL.shape[1] ** 2
        return pairs <= rows * self.length**2 / 2

    @cached_property
    def prompt(self) -> slice:
        return slice(int(self.prompt_lengths_B.max()))

    @cached_property
    def real_CL(self) -> Tensor:
        return torch.arange(int(self.lengths_C.max()), device=self.row_C.device) < self.lengths_C[:, None]

    @cached_property
    def at_CL(self) -> tuple[Tensor, Tensor]:
        """Row and place of every token; behind a completion's end its last one again, which has attended to all that
        the kernel would let those places attend to: no score exceeds its denominator."""
        steps = torch.arange(self.real_CL.shape[1], device=self.row_C.device)
        place_CL = self.start_C[:, None] + torch.minimum(steps, self.lengths_C[:, None] - 1)
        return self.row_C[:, None].expand_as(place_CL), place_CL

    @cached_property
    def at_N(self) -> tuple[Tensor, Tensor]:
        row_CL, place_CL = self.at_CL
        return row_CL[self.real_CL], place_CL[self.real_CL]

    @cached_property
    def hidden_B1TP(self) -> Tensor:
        """Which of its prompt's tokens each token may not attend to: later ones, and what lies behind the prompt."""
        tokens = torch.arange(self.length, device=self.row_C.device)
        seen_BT = torch.minimum(tokens + 1, self.prompt_lengths_B[:, None])
        return (tokens[self.prompt] >= seen_BT[..., None])[:, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, T, P], added to the scores."""
        if dtype not in self._masks:
            self._masks[dtype] = torch.zeros(self.hidden_B1TP.shape, dtype=dtype).masked_fill(
                self.hidden_B1TP, -torch.inf
            )
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, Tensor]:
        return {}

    def gather(self, x_BHT: Tensor) -> Tensor:
        """The completions' tokens: [B, H, T, ...] -> [C, H, L, ...]."""
        return x_BHT.transpose(1, 2)[self.at_CL].transpose(1, 2)

    def put(self, x_BHT: Tensor, y_CHL: Tensor, *, add: bool = False) -> None:
        """The inverse of `gather`, in place."""
        x_BTH, y_NH = x_BHT.transpose(1, 2), y_CHL.transpose(1, 2)[self.real_CL]
        x_BTH[self.at_N] = (x_BTH[self.at_N] + y_NH if add else y_NH).to(x_BHT.dtype)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        prompt, mask = packing.prompt, packing.mask(query.dtype)
        q, k, v = _alike(query, key, value)
        out, total = _flash(q, k[:, :, prompt], v[:, :, prompt], attn_mask=mask, scale=scale)
        own_out, own_total = _flash(*map(packing.gather, (q, k, v)), is_causal=True, scale=scale)
        before, before_total = packing.gather(out), packing.gather(total)
        both = torch.logaddexp(before_total, own_total)
        share = (own_total - both).exp()[..., None].to(torch.promote_types(out.dtype, torch.float32))
        packing.put(out, torch.lerp(before.to(share.dtype), own_out.to(share.dtype), share))
        packing.put(total, both)
        out = out[..., : value.shape[-1]]
        ctx.save_for_backward(query, key, value, out, total)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        packing, scale = ctx.packing, ctx.scale
        prompt, mask = packing.prompt, packing.mask(query.dtype)
        q, k, v = _alike(query, key, value)
        grad, out = (F.pad(x, (0, q.shape[-1] - x.shape[-1])) for x in (grad, out))
        given = grad, q, k[:, :, prompt], v[:, :, prompt], out, total
        dq, *of_prompt = _flash_backward(*given, 0.0, False, attn_mask=mask, scale=scale)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dk[:, :, prompt], dv[:, :, prompt] = of_prompt
        own_grad, *own = map(packing.gather, (grad, q, k, v, out, total))
        own_grad = own_grad * packing.real_CL[:, None, :, None]
        own_gradients = _flash_backward(own_grad, *own, 0.0, True, scale=scale)
        for whole, part in zip((dq, dk, dv), own_gradients, strict=True):
            packing.put(whole, part, add=True)
        gradients = [
            whole[..., : x.shape[-1]].unflatten(1, (x.shape[1], -1)).sum(2)
            for whole, x in zip((dq, dk, dv), (query, key, value), strict=True)
        ]
        return *gradients, None, None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Queries [B, H, T, K], keys [B, h, T, K] and values [B, h, T, V], h dividing H -> [B, T, H, V]. Differentiable.

    What stands at padding is finite and means nothing.
    """
    out: Tensor = _PackedAttention.apply(query, key, value, packing, scale)
    return out.transpose(1, 2)


def _alike(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Of one width, as the kernel wants it (zeros change neither scores nor values), and with as many heads."""
    width, heads = max(query.shape[-1], value.shape[-1]), query.shape[1]
    wide = [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value)]
    return [x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1) for x in wide]


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
    """[B, T, H, V]: transformers' `sdpa` under `attention_mask`, which `packing` replaces where it can be used."""
    beyond = dropout or any(options.get(name) is not None for name in BEYOND)
    if packing is None or query.device.type != "cpu" or beyond or not packing.pays:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, packing, scale), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
