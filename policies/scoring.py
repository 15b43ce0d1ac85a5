"""What models do to the scores of their attention that torch's `sdpa` cannot: windows, caps, sinks and indexers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Scoring(NamedTuple):
    """How a layer scores. A sink is the score of a key without a value, one for each attention head."""

    scale: float = 1.0  # of the products of queries and keys
    window: int | None = None  # a token attends to so many before it, itself included
    cap: float | None = None  # c: a score s becomes c tanh(s / c)
    sink: Tensor | None = None


PLAIN = Scoring()


def capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else cap * torch.tanh(scores / cap)


def with_sink(out: Tensor, total: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a term to the softmax's denominator: returns what is attended to then [..., V], and the logarithm of the
    denominator [..., 1]."""
    return out * torch.sigmoid(total - sink).to(out.dtype), torch.logaddexp(total, sink.to(total.dtype))


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attends [B, T, H, V] by transformers' `sdpa`, or with all scores in memory where these are capped or have a sink.
    The mask is boolean, or added to the scores; without one attention is causal."""
    cap, sink_H = options.get("softcap"), options.get("s_aux")
    if cap is None and sink_H is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    queries, keys = scores.shape[2:]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    scores = capped(scores, cap) + mask
    if sink_H is not None:
        scores = torch.cat([scores, sink_H[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., :keys], options.get("dropout", 0.0))
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


def has_indexer(config: PretrainedConfig) -> bool:
    """Tells whether an indexer chooses the tokens that are attended to. Up to `Policy.max_length` it chooses them all,
    so its choice is ignored; it only must be handed a dense mask."""
    return bool(getattr(config.get_text_config(decoder=True), "index_topk", None))
