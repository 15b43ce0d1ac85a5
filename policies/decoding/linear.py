"""Products with weights that many calls share, arranged once for the CPU's kernels.

oneDNN multiplies bf16 weights in blocks, and `F.linear` rearranges plain ones at every call, which takes half of its
time or more. Torch has operators that keep the arrangement, those of a frozen Inductor graph, but they are not public.
If they are missing or refuse, `F.linear` computes the product. A sampler may hold its weights in fewer bits, see
quantized.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.decoding.quantized import pack


class FixedLinear:
    """x Wᵀ + b for inference. It has no gradient, and a later change of the weight may or may not have an effect.

    >>> FixedLinear(torch.eye(3)[:2])(torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[5., 6.]])
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.in_features = weight_OI.shape[1]
        self.bias = bias_O
        self.blocked = will_block(weight_OI.dtype, weight_OI.device)
        self.packed = pack(weight_OI, self.blocked)
        weight = weight_OI if self.packed is None else self.packed.plain
        self.weight: Any = _block(weight) if self.blocked and weight is not None else weight

    def __call__(self, x: Tensor) -> Tensor:
        """Multiplies [..., in] -> [..., out]."""
        if self.packed is None:
            return self._product(x, self.bias)
        if x.numel() <= self.packed.most_rows * self.in_features:
            out = self.packed(x)
        elif self.packed.scale_O is None:
            return self._product(x, self.bias)
        else:
            out = self._product(x, None) * self.packed.scale_O
        return out if self.bias is None else out + self.bias

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, self.weight, bias) if self.blocked else F.linear(x, self.weight, bias)


def kind_of(linear: FixedLinear) -> str:
    """The kind of a product's weights: `none`, `int8` or `int4`."""
    return "none" if linear.packed is None else linear.packed.kind


def will_block(dtype: torch.dtype, device: torch.device) -> bool:
    """Tells whether weights of this kind are copied into blocks."""
    return dtype == torch.bfloat16 and device.type == "cpu" and _can_block()


def _block(weight_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())


def _product(x: Tensor, blocked: object, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


@cache
def _can_block() -> bool:
    """Tells whether this build of torch and this processor compute a small product correctly."""
    x, weight, bias = torch.linspace(-1, 2, 96 + 512 + 16).bfloat16().split([96, 512, 16])
    x, weight = x.view(3, 32), weight.view(16, 32)
    try:
        return torch.allclose(_product(x, _block(weight), bias), F.linear(x, weight, bias), rtol=2**-7, atol=2**-5)
    except (AttributeError, RuntimeError):
        return False
