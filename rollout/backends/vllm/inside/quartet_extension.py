"""What vLLM's worker learns from us: to take published weights. vLLM mixes `Extension` into its worker class."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from typing import Any

import quartet_bypasses as bypasses
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it

bypasses.allow_any_temperature()  # a worker checks the requests that reach it once more


class Extension:
    """Its methods are called by `collective_rpc`, in every worker process of the engine."""

    model_runner: Any  # the worker's own
    vllm_config: Any
    model_config: Any
    quartet_held: dict[str, torch.Tensor] | None = None  # with adapters: all that was published, before W + ΔW

    def quartet_publish(self, path: str, header: dict[str, Any], chosen: list[str]) -> tuple[dict[str, str], list[str]]:
        """Loads the tensors in the file `path` into the trunk and, with drafts, into the draft head.

        `header` is that of an Update (see rollout/backends/vllm/weights.py). Returns the digests of what was read, and
        the names of the tensors that neither of the two has taken.
        """
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        read, adapters = _read(path, header["tensors"]), header["adapters"]
        held = read if header["whole"] else {**(self.quartet_held or {}), **read}
        self.quartet_held = held if adapters else None
        weights = _merged(held, adapters)
        drafter = getattr(self.model_runner, "drafter", None)
        with Copies() as copies:
            for model in [self.model_runner.get_model(), *([drafter.model] if drafter is not None else [])]:
                bypasses.before_reload(frozenset(chosen), model)
                reload_weights(self.vllm_config, model, iter(weights.items()), None, True)
                tied = bool(self.model_config.hf_config.tie_word_embeddings)
                bypasses.after_reload(frozenset(chosen), model, tied)
        return _digests(read), [name for name, tensor in weights.items() if tensor.numel() and not copies.of(tensor)]


class Copies(TorchDispatchMode):
    """Counts how many numbers are copied out of each tensor: a loader passes over names that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
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
def _merged(held: dict[str, torch.Tensor], adapters: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """Without A and B, and with W + ΔW where there are some, as policies/lora.py computes it on a CPU."""
    factors = {name for a, b, _ in adapters.values() for name in (a, b)}
    weights = {name: tensor for name, tensor in held.items() if name not in factors}
    for name, (a, b, scale) in adapters.items():
        delta = (held[b].float() @ held[a].float() * scale).to(held[b].dtype)
        weights[name] = weights[name] + delta.to(weights[name].dtype)
    return weights


def _read(path: str, tensors: list[list[Any]]) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found, offset = {}, 0
    for name, dtype, shape in tensors:
        kind, count = getattr(torch, dtype), 1
        for size in shape:
            count *= size
        found[name] = torch.frombuffer(held, dtype=kind, count=count, offset=offset).view(shape)
        offset += -(-count * kind.itemsize // ALIGNMENT) * ALIGNMENT
    return found


def _digests(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of type, shape and bits, as rollout/backends/vllm/weights.py makes them."""
    found = {}
    for name, tensor in weights.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found
