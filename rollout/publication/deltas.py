"""What has changed in a tensor since the version before, compressed, for workers on other machines.

An optimizer step changes the low bits of most numbers, and leaves signs and exponents as they are. So the XOR of the
two versions has many zero bytes; they are put side by side, since the first bytes of all numbers are alike.
"""

from __future__ import annotations

import numpy as np
import zstandard

LEVEL = 1  # higher ones gain one per cent and take several times as long
WORTH = 0.9  # of the tensor's own bytes; a delta that is longer does not pay


def encode(new: np.ndarray, old: np.ndarray, itemsize: int) -> np.ndarray | None:
    """Both are bytes of one length. None where the delta is hardly shorter than `new`."""
    different = (new ^ old).reshape(-1, itemsize).T
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(different).data)
    return np.frombuffer(packed, np.uint8) if len(packed) <= WORTH * new.nbytes else None


def decode(packed: np.ndarray, old: np.ndarray, itemsize: int) -> np.ndarray:
    """The new bytes. Raises ValueError for a delta of another tensor."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(packed.tobytes(), max_output_size=old.nbytes)
    except zstandard.ZstdError as error:
        raise ValueError(f"a delta is damaged: {error}") from error
    different = np.frombuffer(raw, np.uint8)
    if different.nbytes != old.nbytes:
        raise ValueError(f"a delta has {different.nbytes} bytes, and its tensor {old.nbytes}")
    return np.ascontiguousarray(different.reshape(itemsize, -1).T).reshape(-1) ^ old
