"""Mixture of experts for decoding: routing, and grouped products for the experts of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config

from policies.decoding.linear import FixedLinear, will_block
from policies.decoding.quantized import round_experts


def route(router_logits_NE: Tensor, bias_E: Tensor, config: DeepseekV3Config) -> tuple[Tensor, Tensor]:
    """Chooses experts by the sigmoid router of DeepSeek-V3 (eq. 12–16): by score + bias, and weighs them by score.

    An expert group's score is the sum of its two best experts. Returns (weights, experts), both [N, k].
    """
    scores = router_logits_NE.float().sigmoid()
    choice = scores + bias_E
    if config.n_group and config.n_group > config.topk_group:
        grouped = choice.view(len(choice), config.n_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        keep = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, True)
        choice = grouped.masked_fill(~keep[..., None], float("-inf")).flatten(1)
    experts = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor, experts


Matrices: TypeAlias = Tensor | Sequence[FixedLinear]  # of all experts: [E, out, in], or one by one


def run_experts(x_ND: Tensor, weights_Nk: Tensor, experts_Nk: Tensor, gate_up: Matrices, down: Matrices) -> Tensor:
    """Computes Σ_k weight · Expert_k(x) [N, D], by two grouped matrix products over the tokens sorted by expert."""
    top_k = experts_Nk.shape[1]
    sorted_experts, order = experts_Nk.flatten().sort(stable=True)
    ends = torch.searchsorted(
        sorted_experts, torch.arange(len(gate_up), device=order.device), right=True, out_int32=True
    )
    x = x_ND[order // top_k]
    gate, up = _grouped(x, gate_up, ends).chunk(2, dim=-1)
    out = _grouped(F.silu(gate) * up, down, ends)
    out = out * weights_Nk.flatten()[order, None].to(out.dtype)
    return torch.empty_like(out).index_copy_(0, order, out).view(len(x_ND), top_k, -1).sum(1)


def held(stack_EOI: Tensor) -> Matrices:
    """The experts as a sampler holds them, see quantized.py."""
    experts = round_experts(stack_EOI, will_block(stack_EOI.dtype, stack_EOI.device))
    return experts if isinstance(experts, Tensor) else [FixedLinear(expert) for expert in experts]


def _grouped(x_MI: Tensor, matrices: Matrices, ends_E: Tensor) -> Tensor:
    """Multiplies each expert's rows, which end at `ends_E`, by its matrix: [M, out]."""
    if isinstance(matrices, Tensor):
        return F.grouped_mm(x_MI, matrices.transpose(1, 2), offs=ends_E)
    parts = x_MI.tensor_split(ends_E.tolist()[:-1])
    return torch.cat([matrix(part) for matrix, part in zip(matrices, parts, strict=True) if len(part)])
