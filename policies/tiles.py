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
NARROWEST = 16  # attention heads of flex attention on CUDA
# A kernel is compiled for each way of padding. Past this limit torch would compute every score without a word.
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


def padded(mask: BlockMask, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Pads [B, H, T, K] with zeros to the lengths of the mask, and to the least width. Tiny policies are narrower."""
    *_, queries, keys = mask.shape
    lengths = (queries, keys, keys)
    return [
        F.pad(x, (0, max(0, NARROWEST - x.shape[-1]), 0, length - x.shape[2]))
        for x, length in zip((query, key, value), lengths, strict=True)
    ]


@cache
def kernel_options(
    attend: Callable[..., Any], device: torch.device, dtype: torch.dtype, widths: tuple[int, int]
) -> dict[str, int] | None:
    """Gives options with which `attend`, forward and backward, fits the shared memory of a device for keys and values
    of these widths; None where none does, and the dense product is computed.

    torch's own tiles are too large for an A100 in float32 with keys of 192 numbers (279,808 of 166,912 bytes), and for
    an L4 or a 4090 in bfloat16 (103,424 of 101,376). Each choice is tried once, smaller tiles after torch's own.
    """
    why = ""
    for size in (None, 64, 32, NARROWEST):
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options = {"num_stages": 1} | dict.fromkeys(names, size) if size else {}
        try:
            with ThreadPoolExecutor(1) as aside:  # where no checkpoint of the caller counts what it saves
                aside.submit(_try, attend, device, dtype, widths, options).result()
            return options
        except torch.OutOfMemoryError:  # of the device, not of a kernel
            raise
        except RuntimeError as error:
            why = why or str(error).strip().splitlines()[0]
    warnings.warn(
        f"flex attention is not used on {device} for keys and values of {widths} numbers in {dtype}: {why}. Rows "
        "attend under a dense mask instead, which takes more memory and time and is not less exact.",
        stacklevel=2,
    )
    return None


def _try(
    attend: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    options: dict[str, int],
) -> None:
    """Attends once and back. Raises RuntimeError where a kernel does not fit."""
    query, key, value = (
        torch.ones(1, 1, TILE, max(NARROWEST, width), dtype=dtype, device=device, requires_grad=True)
        for width in (widths[0], *widths)
    )
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, TILE, TILE, device=device)
    out, more = attend(
        query, key, value, block_mask=mask, kernel_options=options, scale=1.0, return_aux=AuxRequest(lse=True)
    )
    (out.float().sum() + more.lse.sum()).backward()
