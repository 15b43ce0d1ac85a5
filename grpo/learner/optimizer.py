"""What the optimizer moves, how fast, and what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from grpo.config.learner import MTPOptions
from policies.layout import frozen_parameter_names
from policies.policy import Policy

PIECE = 2**18  # numbers: so that their squares take little memory


def freeze_exact_parts(policy: Policy) -> None:
    """Parameters that make a converted policy exact (the cancelled latent norm) stay as they are."""
    patterns = frozen_parameter_names(policy.config) if policy.backend == "native" else []
    for name, parameter in policy.trunk.named_parameters():
        if any(name.endswith(pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def parameter_groups(policy: Policy, learning_rate: float, weight_decay: float, mtp: MTPOptions) -> list[dict]:
    """Weight decay on matrices only; the MTP head has its own learning rate."""
    groups = []
    for module, peak in ((policy.trunk, learning_rate), (policy.mtp, mtp.learning_rate)):
        parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            chosen = [p for p in parameters if (p.dim() > 1) == matrices]
            if chosen:
                groups.append({"params": chosen, "lr": peak, "peak": peak, "weight_decay": decay})
    return groups


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that are sharded over the same ranks in the same way: torch computes only with such at once."""
    together: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kind = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        together.setdefault(kind, []).append(tensor)
    return list(together.values())


def norm_of(alike: Sequence[Tensor]) -> Tensor:
    """√Σx² of tensors that are sharded alike, over all ranks.

    By sums of squares, which torch adds by pairs: its norm of 28 M float32 numbers is .17 % too small on a CPU, and of
    the part of a rank less so.
    """
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in alike]
    total = torch.stack([piece.square().sum() for part in parts for piece in part.flatten().split(PIECE)]).sum()
    if isinstance(first := alike[0], DTensor):
        assert not any(placement.is_partial() for placement in first.placements), first.placements
        to_add = [Replicate() if placement.is_replicate() else Partial() for placement in first.placements]
        total = DTensor.from_local(total, first.device_mesh, to_add).full_tensor()
    return total.sqrt()


def schedule(kind: str, steps: int, warmup: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at step 1 … steps.

    >>> [round(schedule("linear", 4, 0)(step), 2) for step in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """

    def factor(step: int) -> float:
        if step <= warmup:
            return step / warmup
        if kind == "constant":
            return 1.0
        done = (step - 1 - warmup) / max(steps - warmup, 1)
        return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
