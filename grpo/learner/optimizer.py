"""What the optimizer moves, how fast, and what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from policies.layout import frozen_parameter_names
from policies.policy import Policy

CODES, SCALE = ".codes", ".scale"  # ends of the names of moments in 8 bits
PIECE = 2**18  # numbers: so that their squares take little memory
LEAST_EPS = 1e-30  # one that is 0 in float32 makes NaN of weights without gradient


def freeze_exact_parts(policy: Policy) -> None:
    """Parameters that make a converted policy exact (the cancelled latent norm) stay as they are."""
    patterns = frozen_parameter_names(policy.config) if policy.backend == "native" else []
    for name, parameter in policy.trunk.named_parameters():
        if any(name.endswith(pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def groups_of(module: nn.Module | None, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Gives what is trained of a module, as groups for the optimizer. Weight decay is on matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    groups = []
    for matrices, decay in ((True, weight_decay), (False, 0.0)):
        parameters = [parameter for parameter in trained if (parameter.dim() > 1) == matrices]
        if parameters:
            groups.append({"params": parameters, "peak": learning_rate, "weight_decay": decay})
    return groups


def refuse_numbers(*, betas: Sequence[float] = (), eps: float = 1.0, **others: float) -> None:
    """Raises ValueError for numbers with which AdamW would make weights NaN or infinite."""
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas={tuple(betas)}: use two numbers, each 0 or more and below 1")
    if not LEAST_EPS <= eps < math.inf:
        raise ValueError(f"eps={eps}: use a finite number, {LEAST_EPS:g} or more")
    for name, number in others.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}={number}: use a finite number, 0 or more")


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that are sharded over the same ranks in the same way: torch computes only with such at once."""
    together: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kind = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        together.setdefault(kind, []).append(tensor)
    return list(together.values())


def norm_of(alike: Sequence[Tensor]) -> Tensor:
    """√Σx² of tensors that are sharded alike, over all ranks.

    On a CPU by sums of squares, which torch adds by pairs: its norm of 28 M float32 numbers is .17 % too small there,
    and of the part of a rank less so. Elsewhere every kernel that is launched costs time, and torch has one for all.
    """
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in alike]
    pieces = list(chain.from_iterable(part.flatten().split(PIECE) for part in parts))
    on_cpu = parts[0].device.type == "cpu"
    total = torch.stack([piece.square().sum() for piece in pieces]).sum() if on_cpu else at_once(parts)
    if isinstance(first := alike[0], DTensor):
        assert not any(placement.is_partial() for placement in first.placements), first.placements
        to_add = [Replicate() if placement.is_replicate() else Partial() for placement in first.placements]
        total = DTensor.from_local(total, first.device_mesh, to_add).full_tensor()
    return total.sqrt()


def at_once(parts: Sequence[Tensor]) -> Tensor:
    """Σx² by torch's kernel for the norms of many tensors."""
    return torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).square().sum()


def schedule(kind: str, steps: int, warmup: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at step 1 … steps.

    >>> [round(schedule("linear", 4, 0)(step), 2) for step in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [schedule(kind, 4, 2)(0) for kind in ("constant", "linear", "cosine")]  # a learner that counts no steps
    [1.0, 1.0, 1.0]
    """

    def factor(step: int) -> float:
        if 0 < step <= warmup:
            return step / warmup
        if kind == "constant":
            return 1.0
        done = min(max(0, step - 1 - warmup) / max(steps - warmup, 1), 1.0)
        return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def ramp(step: int, steps: int, first: float, last: float) -> float:
    """Grows linearly from `first` at step 1 to `last` at step `steps`, and stays `last` after that.

    >>> [ramp(step, 5, 1, 3) for step in (1, 2, 5, 9)]
    [1.0, 1.5, 3.0, 3.0]
    """
    done = min(1.0, (step - 1) / max(steps - 1, 1)) if steps > 1 else 1.0
    return first + (last - first) * done
