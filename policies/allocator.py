"""Freed memory stays with the process.

glibc returns large blocks to the kernel at once, so each new tensor of some megabytes is paged in again: choosing 64
tokens out of 49,152 spent six times as long on page faults as on arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_BYTES = 2**30
_MOST = 2**25  # the largest that older versions of glibc accept


def keep_freed_memory() -> None:
    """Tells the C library so. It may be called again, and does nothing if the C library has no `mallopt`."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if not libc.mallopt(_M_MMAP_THRESHOLD, _BYTES):
            libc.mallopt(_M_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_M_TRIM_THRESHOLD, _BYTES)
