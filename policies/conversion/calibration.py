"""Second moments of the inputs of a dense model's attention, and how far back its attention heads attend.

L layers, D hidden size, H query heads, J = head_dim / 2 rotary frequencies, T tokens of a window.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from policies.conversion.supported import dense_shape
from policies.devices import wide


@dataclass
class LayerMoments:
    """Moments of the normed input x of one layer's attention, in float64 on the CPU.

    `queries` [D, D] is E[x xᵀ] over all tokens. `keys` [D, D] and `mean` [D] are E[x xᵀ] and E[x] with each token
    weighed by the attention that it gets from all attention heads, since errors of a token without attention do not
    matter. `turn` [H, J] is E[e^{iω(n − m)}] over what attention head h attends to from position m: 1 if the rotation
    of frequency ω hardly changes over the distances at which the attention head attends, near 0 if it makes many turns.
    """

    queries: Tensor
    keys: Tensor
    mean: Tensor
    turn: Tensor


@torch.no_grad()
def observe(
    model: PreTrainedModel, windows: Sequence[Tensor], on_window: Callable[[], None] = lambda: None
) -> list[LayerMoments]:
    """The moments of every layer of a Llama-family `model` over `windows`, token ids [T] each."""
    sums: list[dict[str, Any]] = [defaultdict(float) for _ in model.model.layers]
    with ExitStack() as hooks:
        for layer, total in zip(model.model.layers, sums, strict=True):
            observer = _observer(model.config, total)
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(observer, with_kwargs=True))
        for window in windows:
            model.model(window[None].to(model.device), use_cache=False)
            on_window()
    tokens = sum(map(len, windows))
    return [LayerMoments(**{name: (part / tokens).cpu() for name, part in total.items()}) for total in sums]


def _observer(config: Any, total: dict[str, Any]) -> Callable[[Any, tuple, dict], None]:
    heads, groups, head_dim = dense_shape(config)

    def observe_layer(attention: Any, args: tuple, kwargs: dict) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        length = x.shape[1]
        query = attention.q_proj(x).view(1, length, heads, head_dim).transpose(1, 2)
        key = attention.k_proj(x).view(1, length, groups, head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key = key[0].repeat_interleave(heads // groups, dim=0)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (query[0] @ key.transpose(1, 2) / math.sqrt(head_dim)).masked_fill(future, float("-inf"))
        attended_HTT = scores.softmax(-1)
        angle_TJ = torch.complex(cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2])
        angle_TJ = angle_TJ / angle_TJ.abs()  # without the attention factor of yarn
        seen_HTJ = attended_HTT.to(angle_TJ.dtype) @ angle_TJ
        x = wide(x[0])
        received_T = wide(attended_HTT.sum((0, 1))) / heads
        total["queries"] += x.T @ x
        total["keys"] += (x * received_T[:, None]).T @ x
        total["mean"] += received_T @ x
        total["turn"] += (seen_HTJ * angle_TJ.conj()).sum(1).to(x.device).to(torch.complex128)

    return observe_layer
