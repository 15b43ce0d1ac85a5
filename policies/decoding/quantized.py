"""Matrices in 8 or 4 bits, for a sampler alone: the policy that is sampled is the one with these numbers.

int8 has a scale for each output, int4 one for each GROUP neighbours of a row. Whatever computes a product, the matrix
is the same: its numbers are exact in the precision of decoding, or its scales are multiplied with the result. Which
kernel computes it follows from size, rows and kind of processor, never from the clock (contract 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
ALWAYS = 1 << 62
TILE = 16  # outputs that the kernels compute together
_KIND: ContextVar[str] = ContextVar("kind", default="none")


@contextmanager
def held_as(kind: str) -> Iterator[None]:
    """Every FixedLinear that is made in the block holds its matrix in this kind."""
    token = _KIND.set(kind)
    try:
        yield
    finally:
        _KIND.reset(token)


def kind_now() -> str:
    """Gives the kind of quantisation that the block around asks for."""
    return _KIND.get()


@dataclass
class Packed:
    """A matrix [O, I] whose numbers are those of a kind. At most `most_rows` rows are multiplied by the packed kernel,
    more of them by `plain`, whose products are multiplied by `scale_O`; both are None where they are never used."""

    kind: str
    most_rows: int
    codes: Tensor | None  # [O, I] int8; int4 in torch's own arrangement
    scales: Tensor | None  # int8: [O]; int4: [I / GROUP, O, 2], with zeros
    plain: Tensor | None  # [O, I]
    scale_O: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies [..., I] -> [..., O] by the packed kernel."""
        flat = x.reshape(-1, x.shape[-1])
        return _product(self.kind, flat, self.codes, self.scales).view(*x.shape[:-1], -1)


def pack(weight_OI: Tensor, blocks: bool) -> Packed | None:
    """The matrix in the kind of the block around; None where that is `none`. `blocks`: see `most_rows`."""
    kind = _KIND.get()
    if kind == "none":
        return None
    dtype = weight_OI.dtype
    codes, scales = grid(weight_OI, kind)
    most = most_rows(kind, weight_OI, blocks)
    both = 0 < most < ALWAYS
    plain = scale = None
    if most < ALWAYS:
        if both and kind == "int8":  # a product of two bf16 numbers is not one
            plain, scale = codes.to(dtype), scales[:, 0].to(dtype)
        else:
            plain = _numbers(codes, scales).to(dtype)
    if not most:
        return Packed(kind, 0, None, None, plain, scale)
    if kind == "int8":
        return Packed(kind, most, codes, scales[:, 0].to(dtype), plain, scale)
    return Packed(kind, most, *_arranged(codes, scales.to(dtype)), plain, scale)


def most_rows(kind: str, weight_OI: Tensor, blocks: bool) -> int:
    """The most rows for which torch's packed kernel is no slower than its product with an ordinary matrix.

    By measurement (docs/guides/quantization.md). In float32 the kernels are those of reference, and never pay. Where
    bf16 is multiplied in blocks, they pay for large matrices and few rows; where the processor has no bf16, always.
    """
    cpu = weight_OI.device.type == "cpu" and weight_OI.dtype == torch.bfloat16
    fits = not (weight_OI.shape[0] % TILE or weight_OI.shape[1] % GROUP)  # else the kernel of int8 reads elsewhere
    if not (cpu and fits and _can_multiply(kind)):
        return 0
    if not blocks:
        return ALWAYS
    size = weight_OI.numel()
    if kind == "int4" and size >= 3 << 23:
        return 4
    return 1 if size >= 1 << 24 else 0


def grid(weight_OI: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [O, I] int8, and scales fp32: [O, 1] of int8, [O, ⌈I / GROUP⌉] of int4. A number is code · scale."""
    weight = weight_OI.detach().float()
    most, significant = (127, 8) if kind == "int8" else (7, 5)
    groups = (
        weight[:, None] if kind == "int8" else F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    )
    scales = groups.abs().amax(-1) / most
    if weight_OI.dtype != torch.float32:  # so that scales, and the numbers of int4, are exact in the matrix's precision
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp((mantissa * 2**significant).ceil(), exponent - significant)
    codes = (groups / scales.clamp_min(1e-30)[..., None]).round().clamp(-most, most).to(torch.int8)
    return codes.flatten(1)[:, : weight.shape[1]].contiguous(), scales


def _numbers(codes: Tensor, scales: Tensor) -> Tensor:
    width = codes.shape[1] if scales.shape[1] == 1 else GROUP
    return codes.float() * scales.repeat_interleave(width, 1)[:, : codes.shape[1]]


def round_experts(stack: Tensor, blocks: bool) -> Tensor | list[Tensor]:
    """A stack of experts [E, O, I] with the numbers of the kind, or, where the packed kernel always pays, its matrices,
    each for a FixedLinear of its own."""
    kind = _KIND.get()
    if kind == "none":
        return stack
    if most_rows(kind, stack[0], blocks) == ALWAYS:
        return list(stack)
    return torch.stack([_numbers(*grid(expert, kind)).to(stack.dtype) for expert in stack])


def _arranged(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    return packed, torch.stack([scales.T, torch.zeros_like(scales.T)], -1).contiguous()


def _product(kind: str, x: Tensor, codes: object, scales: object) -> Tensor:
    if kind == "int8":
        return torch._weight_int8pack_mm(x, codes, scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scales)


@cache
def _can_multiply(kind: str) -> bool:
    """Tells whether this build of torch and this processor compute a small product of this kind correctly."""
    x, weight = torch.linspace(-1, 2, 96 + 1024).bfloat16().split([96, 1024])
    x, weight = x.view(3, 32), weight.view(32, 32)
    codes, scales = grid(weight, kind)
    expected = F.linear(x.float(), _numbers(codes, scales))
    try:
        held: Sequence[Tensor] = (codes, scales[:, 0].bfloat16())
        if kind == "int4":
            held = _arranged(codes, scales.bfloat16())
        return torch.allclose(_product(kind, x, *held).float(), expected, rtol=2**-7, atol=2**-5)
    except (AttributeError, RuntimeError):
        return False
