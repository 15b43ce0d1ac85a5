"""Attention of queries to cached vectors, by the kernel of their device.

Axes: B rows or prompts, N queries (new tokens times attention heads), T cached vectors of width E, K width of a key.
All attention heads attend to the same vectors, so the queries of a row's heads are those of one head for a kernel.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from policies import devices
from policies.scoring import capped

ALIGNED = 16  # entries: where a row of torch's mask begins on CUDA
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def attention(
    query_BNK: Tensor, cached_BTE: Tensor, value_width: int, mask_BNT: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attended values [B, N, V], and the logarithms of the softmax's denominators [B, N, 1], in float32 or above.

    Keys are the last K entries of the cached vectors and values the first V. A query to which nothing is visible gets
    arbitrary finite values. With `cap` c a score s becomes c tanh(s / c), which no kernel of torch computes.
    """
    if cap is not None:
        return plain_attention(query_BNK, cached_BTE, value_width, mask_BNT, cap)
    device, widths = query_BNK.device, (query_BNK.shape[-1], cached_BTE.shape[-1], value_width)
    if device.type == "cpu":
        attend = cpu_attention
    elif devices.has_cuda(device) and cuda_attention_agrees(device, query_BNK.dtype, widths):
        attend = cuda_attention
    else:
        attend = plain_attention
    return attend(query_BNK, cached_BTE, value_width, mask_BNT)


def plain_attention(
    query_BNK: Tensor, cached_BTE: Tensor, value_width: int, mask_BNT: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attends by products and a softmax, on any device."""
    scores = query_BNK @ cached_BTE[..., -query_BNK.shape[-1] :].transpose(1, 2)
    scores = capped(scores.to(torch.promote_types(scores.dtype, torch.float32)), cap) + mask_BNT
    weights = scores.softmax(-1).nan_to_num()  # of a query to which nothing is visible
    return weights.to(cached_BTE.dtype) @ cached_BTE[..., :value_width], scores.logsumexp(-1, keepdim=True)


def cpu_attention(query_BNK: Tensor, cached_BTE: Tensor, value_width: int, mask_BNT: Tensor) -> tuple[Tensor, Tensor]:
    """Attends by torch's kernel for a CPU, which reads latents in place; a batched product would copy them in bf16.

    It needs keys and values of one width. The narrower of them is widened into its neighbour's entries, which are
    multiplied by zeros of the query or cut off the result.
    """
    key_width = query_BNK.shape[-1]
    width = max(key_width, value_width)
    query = F.pad(query_BNK, (width - key_width, 0)) if width > key_width else query_BNK
    keys, values = cached_BTE[:, None, :, -width:], cached_BTE[:, None, :, :width]
    mask = mask_BNT.expand(-1, query.shape[1], -1)[:, None]
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None], keys, values, attn_mask=mask, scale=1.0
    )
    return out[:, 0, :, :value_width], total.view(*query.shape[:2], 1)


def cuda_attention(query_BNK: Tensor, cached_BTE: Tensor, value_width: int, mask_BNT: Tensor) -> tuple[Tensor, Tensor]:
    """Attends by torch's memory-efficient kernel for CUDA (Rabe & Staats 2021), which reads latents in place and never
    writes the scores. It takes any widths, and a mask whose rows begin at multiples of 16 entries.
    """
    queries, entries = query_BNK.shape[1], mask_BNT.shape[-1]
    mask = mask_BNT.to(query_BNK.dtype)
    if entries % ALIGNED:
        mask = F.pad(mask, (0, -entries % ALIGNED))[..., :entries]
    keys, values = cached_BTE[:, None, :, -query_BNK.shape[-1] :], cached_BTE[:, None, :, :value_width]
    out, total, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query_BNK[:, None], keys, values, mask.expand(-1, queries, -1)[:, None], True, scale=1.0
    )
    return out[:, 0].nan_to_num(), total[:, 0, :queries, None]  # the sums are padded to a multiple of 32


@cache
def cuda_attention_agrees(device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]) -> bool:
    """Tells whether torch's kernel takes keys, vectors and values of these widths and computes what plain products do.

    Tried once; a warning says why not, and plain products are computed from then on.
    """
    key_width, width, value_width = widths
    made = torch.Generator(device).manual_seed(0)
    query = torch.randn(3, 40, key_width, generator=made, device=device) / key_width**0.5
    cached = torch.randn(3, 48, width, generator=made, device=device)[:, :41]
    hidden = torch.rand(3, 40, 41, generator=made, device=device) < 0.4
    hidden[..., 0], hidden[1, 2] = False, True  # all see something, but for one
    mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)
    query, cached = query.to(dtype), cached.to(dtype)
    expected = plain_attention(query.double(), cached.double(), value_width, mask.double())
    try:
        result = cuda_attention(query, cached, value_width, mask)
        sees = ~hidden.all(-1)
        far = max(float((f - e)[sees].abs().max()) for f, e in zip(result, expected, strict=True))
        if far <= CLOSE.get(dtype, 0.0) and bool(result[0].isfinite().all()):
            return True
        why = f"its results are up to {far:.2g} from those of plain products"
    except RuntimeError as error:  # among them what is not implemented for this device or these widths
        why = str(error).splitlines()[0]
    warnings.warn(
        f"torch's attention kernel is not used on {device} for cached vectors of {width} numbers in {dtype}: {why}. "
        "Plain products are computed instead, which is slower and not less exact.",
        stacklevel=2,
    )
    return False
