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


def at_once(device: torch.device) -> bool:
    """Tells whether noise and choice are one operator there."""
    return device.type != "cpu"


@torch.library.custom_op("quartet::choose", mutates_args=())
def choose_at_once(
    logits_NV: Tensor, keys_N2: Tensor, positions_N: Tensor, temperature: float, vocabulary: int, drafted: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Chooses as `choose`, with the noise of these keys at these positions, for a `vocabulary` of so many tokens.
    `drafted` are the tensors of a `DraftVocabulary`, or none."""
    ids, logprobs = _function(logits_NV.device.type)(logits_NV, keys_N2, positions_N, temperature, vocabulary, drafted)
    return ids, logprobs


@cache
def _function(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    from torch.utils._triton import has_triton

    from rollout.sampling import choose_by_keys

    return torch.compile(choose_by_keys, dynamic=True) if kind == "cuda" and has_triton() else choose_by_keys
