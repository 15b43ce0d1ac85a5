"""How weights reach vLLM's workers: an engine of vLLM's weight transfer API. Its transport is a file in memory.

vLLM prepares a model for weights in the layout of a checkpoint and packs them for its kernels afterwards, on a GPU as
on a CPU. Its own transports are not used: NCCL and CUDA IPC want vLLM in the trainer's process, and IPC sends pickles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import quartet_bypasses as bypasses
import quartet_tensors as tensors
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class Chosen(WeightTransferInitInfo):
    bypasses: list[str]


@dataclass
class Published(WeightTransferUpdateInfo):
    """A file of tensors and the header of its Update (see rollout/vllm/weights.py). Without a file a model,
    such as the draft head, takes the weights that came last."""

    path: str | None = None
    header: dict[str, Any] | None = None


class SharedMemory(WeightTransferEngine[Chosen, Published]):
    """vLLM's worker calls start_weight_update, update_weights and finish_weight_update, once for each of its models."""

    init_info_cls, update_info_cls = Chosen, Published

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.chosen: frozenset[str] = frozenset()
        self.held: dict[str, torch.Tensor] = {}  # with adapters: all that was published, before W + ΔW
        self.read: dict[str, torch.Tensor] = {}  # out of the last file
        self.weights: dict[str, torch.Tensor] = {}
        self.copies = tensors.Copies()

    def init_transfer_engine(self, init_info: Chosen) -> None:
        self.chosen = frozenset(init_info.bypasses)

    def start_weight_update(self) -> None:
        bypasses.before_reload(self.chosen, self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.device.type == "cpu":  # vLLM's own method waits for an accelerator
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: Published) -> None:
        if update_info.path is not None:
            assert update_info.header is not None
            header = update_info.header
            self.read, self.copies = tensors.read(update_info.path, header["tensors"]), tensors.Copies()
            held = self.read if header["whole"] else {**self.held, **self.read}
            self.weights = tensors.merged(held, header["adapters"])
            self.held = held if header["adapters"] else {}
        with self.copies:
            self.model.load_weights(iter(self.weights.items()))

    def finish_weight_update(self) -> None:
        with self.copies:
            finalize_layerwise_reload(self.model, self.model_config)
        tied = bool(self.vllm_config.model_config.hf_config.tie_word_embeddings)
        bypasses.after_reload(self.chosen, self.model, tied)

    def confirm(self) -> tuple[dict[str, str], list[str]]:
        """The digests of what was read, and the names of the tensors that no model took. The tensors are dropped."""
        unused = [name for name, each in self.weights.items() if each.numel() and not self.copies.of(each)]
        digests = tensors.digests(self.read)
        self.read, self.weights = {}, {}
        return digests, unused

    def shutdown(self) -> None:
        self.held = {}
