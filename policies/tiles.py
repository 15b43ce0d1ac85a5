"""What torch's flex attention is compiled for: few lengths, and tiles that fit the shared memory of a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask

TILE = 128
NARROWEST = 16  # head of flex attention on CUDA, and tile
# Kernels are compiled for a few shapes each. Past this limit torch would compute every score without a word.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
torch._dynamo.config.fail_on_recompile_limit_hit = True


def length_of(tokens: int) -> int:
    """Gives the length to which so many tokens are padded: of an octave four, and no less than a whole tile apart. So
    rows of up to 32,768 tokens have 28 lengths, and at most a fifth of a long one is padding, which attends to itself.

    >>> [length_of(tokens) for tokens in (5, 128, 129, 1025, 5000)]
    [128, 128, 256, 1280, 5120]
    """
    step = max(TILE, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def padded(mask: BlockMask, *tensors: Tensor) -> list[Tensor]:
    """Pads query, key and value [B, H, T, K] with zeros to the lengths of the mask, and to the least width."""
    lengths = (mask.shape[-2], mask.shape[-1], mask.shape[-1])
    sizes = [(max(0, NARROWEST - x.shape[3]), t - x.shape[2]) for x, t in zip(tensors, lengths, strict=True)]
    return [F.pad(x, (0, wider, 0, longer)) for x, (wider, longer) in zip(tensors, sizes, strict=True)]


@cache
def kernel_options(
    attend: Callable[..., Any], device: torch.device, dtype: torch.dtype, key_width: int, value_width: int
) -> dict[str, int] | None:
    """Gives options with which `attend`, forward and backward, fits the shared memory of a device; None where none do,
    and a dense mask takes its place. Each choice is tried once.

    torch's own tiles are too large for an A100 in float32 with keys of 192 numbers (279,808 of 166,912 bytes), and for
    an L4 or a 4090 in bfloat16 (103,424 of 101,376).
    """

    def attempt(options: dict[str, int]) -> None:
        widths = (max(NARROWEST, width) for width in (key_width, key_width, value_width))
        tensors = [torch.ones(1, 1, TILE, w, dtype=dtype, device=device, requires_grad=True) for w in widths]
        mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, TILE, TILE, device=device)
        more = {"kernel_options": options, "return_aux": AuxRequest(lse=True)}
        out, aux = attend(*tensors, block_mask=mask, scale=1.0, **more)
        (out.float().sum() + aux.lse.sum()).backward()

    why = ""
    names = "BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"
    for options in ({}, *({"num_stages": 1} | dict.fromkeys(names, size) for size in (64, 32, NARROWEST))):
        try:
            with ThreadPoolExecutor(1) as aside:  # where no checkpoint of the caller counts what it saves
                aside.submit(attempt, options).result()
            return options
        except torch.OutOfMemoryError:  # of the device, not of a kernel
            raise
        except RuntimeError as error:
            why = why or str(error).strip().splitlines()[0]
    warnings.warn(
        f"flex attention is not used on {device} for keys of {key_width} and values of {value_width} numbers in {dtype}"
        f": {why}. A dense mask takes its place, which needs more memory and time and is not less exact.",
        stacklevel=2,
    )
    return None
