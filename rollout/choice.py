"""Noise and choice as one operator of torch, for devices on which every call of a kernel costs the host time.

On CUDA the function is compiled, so that a round calls a few kernels for it and not a hundred. A CPU calls the plain
functions of sampling.py: there nothing is saved, and the noise of a block is shared by its drafts and their
verification. No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Choose = Callable[..., tuple[Tensor, Tensor]]


def at_once(device: torch.device) -> bool:
    """Tells whether noise and choice are one operator there."""
    return device.type != "cpu"


def operator(plain: Choose) -> Choose:
    """The operator `quartet::choose`, which computes what `plain` does."""

    @cache
    def function(kind: str) -> Choose:
        from torch.utils._triton import has_triton

        return torch.compile(plain, dynamic=True) if kind == "cuda" and has_triton() else plain

    @torch.library.custom_op("quartet::choose", mutates_args=())
    def choose_at_once(
        logits_NV: Tensor,
        keys_N2: Tensor,
        positions_N: Tensor,
        temperature: float,
        vocabulary: int,
        drafted: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        ids, logprobs = function(logits_NV.device.type)(
            logits_NV, keys_N2, positions_N, temperature, vocabulary, drafted
        )
        return ids, logprobs

    return choose_at_once
