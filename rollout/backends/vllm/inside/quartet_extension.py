"""What vLLM's worker learns from us: to take published weights. vLLM mixes `Extension` into its worker class."""

from __future__ import annotations

import hashlib
import mmap
from typing import Any

import quartet_bypasses as bypasses
import torch

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it

bypasses.allow_any_temperature()  # a worker checks the requests that reach it once more


class Extension:
    """Its methods are called by `collective_rpc`, in every worker process of the engine."""

    model_runner: Any  # the worker's own
    vllm_config: Any
    model_config: Any

    def quartet_publish(self, path: str, tensors: list[list[Any]], chosen: list[str]) -> dict[str, str]:
        """Loads the tensors in the file `path` into the trunk and, with drafts, into the draft head.

        `tensors` are [name, dtype, shape], in the order of their bytes. Returns their digests.
        """
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        weights = _read(path, tensors)
        drafter = getattr(self.model_runner, "drafter", None)
        for model in [self.model_runner.get_model(), *([drafter.model] if drafter is not None else [])]:
            bypasses.before_reload(frozenset(chosen), model)
            reload_weights(self.vllm_config, model, iter(weights.items()), None, True)
            tied = bool(self.model_config.hf_config.tie_word_embeddings)
            bypasses.after_reload(frozenset(chosen), model, tied)
        return _digests(weights)


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
