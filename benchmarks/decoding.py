"""Decode steps of several models, taking turns: milliseconds, bytes read and FLOPs per token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import prod
from statistics import median
from typing import Any, Protocol
from unittest import mock

import torch
from multi_head_decoder import MultiHeadDecoder
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from policies.anatomy import cache_numbers
from policies.decoding import kernels, latent_cache
from policies.decoding.absorbed import AbsorbedTrunk
from policies.decoding.linear import FixedLinear
from policies.policy import Policy


class Decoder(Protocol):
    config: Any
    blocks: Sequence[Any]
    head: Tensor
    norm: Tensor

    def start(self, rows: int, context: int, room: int) -> None: ...

    def step(self, token_ids_R: Tensor) -> Tensor: ...


class LatentDecoder(AbsorbedTrunk):
    """The project's own absorbed MLA trunk behind the same three names as `MultiHeadDecoder`."""

    def start(self, rows: int, context: int, room: int) -> None:
        self.rows = self.cache(rows, context + room)
        for latents in self.rows.layers_RTE:
            latents.normal_()
        self.rows.advance(context)

    def step(self, token_ids_R: Tensor) -> Tensor:
        hidden = self(token_ids_R[:, None], self.rows.lengths_R[:, None], self.rows)
        self.rows.advance(1)
        return self.logits(hidden[:, 0])


def decoder_of(policy: Policy, dtype: torch.dtype, length: int) -> Decoder:
    if isinstance(policy.trunk, LlamaForCausalLM):
        return MultiHeadDecoder(policy.trunk, dtype, length)
    return LatentDecoder(policy.trunk, dtype, length)


def weight_bytes(decoder: Decoder) -> int:
    """What one step reads of a dense model's weights: all but the embedding, of which it reads a row a token."""
    parts = [part for block in decoder.blocks for part in vars(block).values()]
    linears = [part for part in parts if isinstance(part, FixedLinear)]
    tensors = [*parts, *(linear.weight for linear in linears), *(linear.bias for linear in linears)]
    return sum(t.nbytes for t in (*tensors, decoder.head, decoder.norm) if isinstance(t, Tensor))


def _linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(x_shape) * weight_shape[0]


def _grouped_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(x_shape) * weight_shape[2]


# What torch's counter does not know: products with blocked weights, those of experts, and the fused attention of a CPU.
UNKNOWN: dict[Any, Any] = {torch.ops.aten._grouped_mm: _grouped_flops}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    UNKNOWN[torch.ops.mkldnn._linear_pointwise] = _linear_flops
plainly = mock.patch.object(latent_cache, "attention", kernels.plain_attention)


@torch.inference_mode()
def measure(
    decoders: Mapping[str, Decoder], points: Sequence[tuple[int, int]], steps: int, warm_up: int = 3, rounds: int = 2
) -> dict[str, list[dict[str, float]]]:
    """Per model and (rows, context): median ms of a step, FLOPs per token and, for dense models, bytes per token.

    Models take turns, `rounds` times at every point, so that a slow minute of the machine hits all of them.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in decoders}
    for rows, context in points:
        timed: dict[str, list[float]] = {name: [] for name in decoders}
        flops = {}
        for _ in range(rounds):
            for name, decoder in decoders.items():
                tokens = torch.randint(2, len(decoder.head), (rows,), device=decoder.head.device)
                decoder.start(rows, context, warm_up + steps + 1)
                timed[name] += _times(decoder, tokens, warm_up, steps)
                with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter, plainly:
                    decoder.step(tokens)
                flops[name] = counter.get_total_flops() / rows
        for name, decoder in decoders.items():
            size = decoder.head.element_size()
            read = weight_bytes(decoder) / rows + context * cache_numbers(decoder.config) * size
            milliseconds = 1e3 * median(timed[name])
            found[name].append(
                {"rows": rows, "context": context, "ms": milliseconds, "tokens_per_second": 1e3 * rows / milliseconds}
                | {"bytes_read_per_token": read, "flops_per_token": flops[name]}
            )
    return found


def _times(decoder: Decoder, tokens: Tensor, warm_up: int, steps: int) -> list[float]:
    seconds = []
    for _ in range(warm_up + steps):
        started = time.perf_counter()
        decoder.step(tokens)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]
