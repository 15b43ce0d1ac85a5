"""Digests of weights, tensor by tensor: what a sampler holds is compared with what was published (contract 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from policies.sharding import whole

Held = dict[str, tuple[str, str]]  # by tensor: its type, and its digest


def checksum_of(tensor: Tensor) -> str:
    """A digest of shape, type and bits, the same in every process; as fast as memory, and not made against forgery."""
    import xxhash  # which decoding alone does without

    host = whole(tensor.detach()).cpu().contiguous()
    digest = xxhash.xxh3_128(f"{host.dtype} {tuple(host.shape)}".encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksums(weights: Mapping[str, Tensor]) -> Held:
    return {name: (str(t.dtype).removeprefix("torch."), checksum_of(t)) for name, t in weights.items()}


def first_difference(weights: Mapping[str, Tensor], held: Held) -> str | None:
    """The first tensor that a sampler lacks, has too much or holds otherwise; None where there is none.

    A sampler may hold a tensor in another type, and then what counts is the value in that type.
    """
    for name, tensor in weights.items():
        if name not in held or checksum_of(tensor.to(getattr(torch, held[name][0]))) != held[name][1]:
            return name
    return next((name for name in held if name not in weights), None)
