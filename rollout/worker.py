"""A rollout worker: one engine in a Ray actor, and how weights reach it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from policies.policy import Policy, digest
from policies.sharding import whole
from rollout.depth import CostTable
from rollout.engine import Engine, RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams

PackedWeights = dict[str, tuple[str, list[int], np.ndarray]]


def pack(weights: Mapping[str, Tensor]) -> PackedWeights:
    """Tensors as bytes with type and shape, since Ray shares NumPy arrays without a copy and NumPy has no bfloat16."""
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in weights.items()
    }


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape, data) in packed.items()
    }


class Worker:
    """Samples shards, only with weights that it has confirmed. The pool makes it a Ray actor."""

    def __init__(self, skeleton: dict[str, bytes], held: str, dtype: str, device: str, threads: int) -> None:
        """`held`: precision of its copy of the policy and of the published weights; `dtype`: precision of decoding."""
        torch.set_num_threads(threads)
        policy = Policy.from_skeleton(skeleton, getattr(torch, held)).to(device)
        self.engine = Engine(policy, getattr(torch, dtype))
        self.engine.version = -1

    def publish(self, packed: PackedWeights, version: int) -> str:
        """Copy weights; returns the digest of what arrived (contract 5)."""
        weights = unpack(packed)
        self.engine.publish(weights, version)
        return digest(weights)

    def measure_costs(self, rows: int) -> CostTable:
        return self.engine.measure_costs(min(rows, self.engine.max_rows))

    def sample(
        self, prompts: list[Prompt], params: SamplingParams, version: int, costs: CostTable | None = None
    ) -> list[RolloutGroup]:
        if self.engine.version != version:
            raise RolloutError(
                f"a worker holds policy version {self.engine.version}, but version {version} was asked for"
            )
        self.engine.costs = costs or self.engine.costs
        return self.engine.sample(prompts, params)
