"""Return freed host memory to the system, so that the resident size follows the memory in use."""

from __future__ import annotations

import ctypes
import sys

# By default glibc raises this threshold up to 32 MB; smaller freed buffers then stay in the heap.
LARGE_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3


def trim_heap() -> None:
    """Return the free memory of small objects, such as a tokenizer's, to the system (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def return_freed_memory() -> bool:
    """Make the C library return buffers of `LARGE_BYTES` or more to the system when freed.

    Applies to the whole process; each new buffer costs page faults. Returns False if the C library
    has no such setting.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt is not None and mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
