"""Keeps freed memory from staying with the process, so that its resident size is what it holds and
not what it once held.
"""

from __future__ import annotations

import ctypes
import sys

# glibc raises this threshold up to 32 MB by itself, after which freed buffers stay in a heap that
# only grows.
LARGE_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3


def trim_heap() -> None:
    """Gives back what small objects have left free, such as the hundreds of megabytes of a
    tokenizer of 256,384 pieces.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def return_freed_memory() -> bool:
    """Buffers of `LARGE_BYTES` and more go back to the system the moment they are freed; False
    where the C library has no such switch.

    It holds for the whole process, changes no result, and costs the page faults of a fresh buffer.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt is not None and mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
