"""A publication as vLLM reads it: the tensors of the checkpoint layout, named, then byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from policies.layout import expert_views, head_state, may_idle
from policies.policy import Policy
from policies.sharding import whole

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it, as inside/quartet_extension.py reads them


def in_checkpoint_layout(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published `weights` of a policy of this shape under the names that its saved checkpoint has.

    A tied LM head is left out, and the draft vocabulary, which vLLM does not know.
    """
    read = {name: whole(tensor) for name, tensor in weights.items()}  # once, in order: other ranks take part
    trunk, head = ({n.removeprefix(p): t for n, t in read.items() if n.startswith(p)} for p in ("trunk.", "mtp."))
    if policy.config.tie_word_embeddings:
        trunk.pop("lm_head.weight", None)
    if policy.backend == "transformers":
        return revert_weight_conversion(policy.trunk, trunk)
    if head:
        config = policy.config
        trunk |= head_state(config, config.num_hidden_layers, head, may_idle(config))
    return {name: view for stacked, tensor in trunk.items() for name, view in expert_views(stacked, tensor)}


def described(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    """[name, dtype, shape] of each, in order."""
    return [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]


def length(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that `stream` gives."""
    return sum(tensor.nbytes + -tensor.nbytes % ALIGNMENT for tensor in tensors.values())


def stream(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        yield _bytes(tensor)
        yield memoryview(bytes(-tensor.nbytes % ALIGNMENT))


def first_difference(tensors: Mapping[str, Tensor], held: Mapping[str, str]) -> str | None:
    """The first tensor that vLLM did not load as it was sent; None where there is none.

    hashlib, and not the faster digests of rollout.publication, since vLLM's environment need have nothing else.
    """
    for name, tensor in tensors.items():
        found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
        if held.get(name) != found.hexdigest():
            return name
    return next((name for name in held if name not in tensors), None)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
