"""Published tensors as they arrive at vLLM: read from a file, merged with adapters, proved. It needs no vLLM."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch._ops import OpOverload

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it


class Copies(TorchDispatchMode):
    """Counts how many numbers are copied out of each tensor: a loader passes over names that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: Counter[int] = Counter()

    def __torch_dispatch__(
        self, function: OpOverload, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if function is torch.ops.aten.copy_.default and args[0].device.type != "meta":
            self.copied[_place(args[1])] += args[1].numel()
        elif function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.copied[_place(args[0])] += args[0].numel()
        return function(*args, **(kwargs or {}))

    def of(self, tensor: torch.Tensor) -> int:
        return self.copied[_place(tensor)]


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0


@torch.no_grad()
def merged(held: dict[str, torch.Tensor], adapters: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """The tensors without A and B, and with W + ΔW where there are some, as policies/lora.py computes it on a CPU."""
    factors = {name for a, b, _ in adapters.values() for name in (a, b)}
    weights = {name: tensor for name, tensor in held.items() if name not in factors}
    for name, (a, b, scale) in adapters.items():
        delta = (held[b].float() @ held[a].float() * scale).to(held[b].dtype)
        weights[name] = weights[name] + delta.to(weights[name].dtype)
    return weights


def read(path: str, tensors: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Reads the tensors of a file; `tensors` has [name, dtype, shape] of each in order."""
    with open(path, "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors_read, offset = {}, 0
    for name, dtype, shape in tensors:
        kind, count = getattr(torch, dtype), 1
        for size in shape:
            count *= size
        tensors_read[name] = torch.frombuffer(held, dtype=kind, count=count, offset=offset).view(shape)
        offset += -(-count * kind.itemsize // ALIGNMENT) * ALIGNMENT
    return tensors_read


def digests(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Digests of type, shape and bits, as rollout/vllm/weights.py makes them."""
    by_name = {}
    for name, tensor in weights.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        by_name[name] = digest.hexdigest()
    return by_name
