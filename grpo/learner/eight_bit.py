"""AdamW whose moments are codes of 8 bits with a scale for each block of them, by torchao: 2 bytes a weight, not 8.

torchao cuts what a rank holds into blocks of 256 numbers. Here a block never crosses a row: its length divides the last
dimension. So codes and scales can be sharded as their weight is, and a checkpoint fits any number of ranks.

Moments of fewer than 4,096 numbers on a rank, and of rows that no block fits, stay fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo.learner.optimizer import CODES, SCALE
from policies.sharding import like

LEAST, SHORTEST, LONGEST = 4096, 32, 256  # numbers in a moment, as in bitsandbytes; in a block


def adamw_8bit(groups: Sequence[dict], betas: tuple[float, float], *, rounds: bool = False) -> torch.optim.Optimizer:
    """It steps as `torch.optim.AdamW`; the learning rate of a group must be a tensor. With `rounds`, bfloat16 weights
    are rounded stochastically: to the nearer neighbour by the chance that makes the mean exact."""
    from torchao.optim import AdamW8bit

    class InRows(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            self.block_size = block_of(p) or p.numel() + 1  # which divides nothing: fp32
            return super()._new_buffer(torch.empty_like(p, dtype=torch.float32), signed)  # also of a bfloat16 weight

        def step(self, closure: object = None) -> None:
            """The chance depends on how many steps were made before: a run that goes on makes the same ones, and
            ranks that hold the same weight round it alike."""
            done = max((int(state["step"]) for state in self.state.values()), default=0)
            with torch.random.fork_rng():
                torch.manual_seed(done)
                super().step(closure)

    return InRows(groups, betas=betas, bf16_stochastic_round=rounds)


def block_of(weight: Tensor) -> int:
    """Counts the numbers of a moment that share a scale, the same on every rank; 0 where it stays fp32.

    >>> block_of(torch.zeros(49152, 576)), block_of(torch.zeros(576))
    (192, 0)
    """
    shards = [1] * weight.dim()
    for i, placement in enumerate(weight.placements if isinstance(weight, DTensor) else ()):
        if (dim := getattr(placement, "dim", None)) is not None:
            shards[dim] *= weight.device_mesh.size(i)
    least = [size - (ranks - 1) * -(-size // ranks) for size, ranks in zip(weight.shape, shards, strict=True)]
    if min(least) <= 0 or prod(least) < LEAST or weight.shape[-1] % shards[-1]:
        return 0
    return next((block for block in range(LONGEST, SHORTEST - 1, -1) if least[-1] % block == 0), 0)


def parts(moment: Tensor) -> dict[str, Tensor]:
    """Gives what a checkpoint keeps of an entry of the optimizer's state, by the end of its name: itself, or codes
    [..., N] and scales [..., N / block], sharded as it is."""
    local: Tensor = moment.to_local() if isinstance(moment, DTensor) else moment
    if not hasattr(local, "codes"):
        return {"": moment}
    return {CODES: _spread(local.codes, moment), SCALE: _spread(local.scale.view(*local.shape[:-1], -1), moment)}


def moment_of(
    optimizer: torch.optim.Optimizer, weight: Tensor, signed: bool, value: Tensor, scale: Tensor | None
) -> Tensor:
    """The inverse of `parts`: `value` is the whole moment, or the whole codes with their `scale`.

    The bits are the same where the blocks are. Else the numbers are rounded again: where fewer ranks hold more of a
    weight, or a run goes on from fp32 moments.
    """
    fresh = cast(Any, optimizer)._new_buffer(weight, signed)
    local: Tensor = fresh.to_local() if isinstance(fresh, DTensor) else fresh
    if scale is not None and hasattr(local, "codes") and _local(like(scale, weight)).numel() == local.scale.numel():
        local.codes.copy_(_local(like(value, weight)))
        local.scale.copy_(_local(like(scale, weight)).flatten())
        return fresh
    if scale is not None:
        value = _numbers(value, scale, signed)
    local.copy_(_local(like(value, weight)).to(local.device))
    return fresh


def _numbers(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    numbers = torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=codes.device)[codes.int()]
    return (numbers.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(local: Tensor, moment: Tensor) -> Tensor:
    """`own` of every rank as one tensor that is sharded as `moment` is, with rows of another length."""
    if not isinstance(moment, DTensor):
        return local
    shape = [*moment.shape[:-1], moment.shape[-1] * local.shape[-1] // moment.to_local().shape[-1]]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, moment.device_mesh, moment.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
