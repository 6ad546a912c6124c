"""Recognize out-of-memory errors, retry after them, and release unused memory."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from lowvram.errors import OutOfMemoryError
from lowvram.memory.malloc import trim_heap

T = TypeVar("T")
# What messages of drivers, allocators and libraries say. A cuBLAS that "is not initialized" is one
# that found no room for its handle; cuDNN finds no "engine" for a convolution where none of its
# algorithms got its workspace.
SIGNS = (
    "out of memory",
    "can't allocate memory",
    "_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "unable to find an engine",
)


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Raise memory errors of any library as `OutOfMemoryError`, with their first line and the
    budget that is short.

    Leave the handler before a retry: the error's traceback refers to the memory.
    """
    try:
        yield
    except (OutOfMemoryError, RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(first_line, short_budget(error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be allocated: by the driver, torch, a library,
    Python or the system.
    """
    if isinstance(error, OutOfMemoryError | torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)


def short_budget(error: BaseException) -> str:
    """The budget that an out-of-memory error is about: VRAM or RAM."""
    if isinstance(error, OutOfMemoryError):
        return error.budget
    host = isinstance(error, MemoryError | OSError) or "can't allocate memory" in str(error)
    return "RAM" if host else "VRAM"


def retry_out_of_memory(
    device: torch.device, work: Callable[[], T], recover: Callable[[str, str], None]
) -> T:
    """The result of `work`, called again after each out-of-memory error.

    recover: called between two calls as `recover(budget, message)`, with the failed call's memory
    released; it prepares the next call or raises.
    """
    release_cached_memory(device)  # what earlier work has left in torch's allocator
    while True:
        try:
            with as_out_of_memory():
                return work()
        except OutOfMemoryError as error:
            # Only text leaves the handler: the error refers to the failed call's tensors.
            budget, message = error.budget, str(error)
        release_cached_memory(device)
        recover(budget, message)


def release_cached_memory(device: torch.device) -> None:
    """Free unreferenced memory: Python's cycles, the heap's free pages, and the device memory
    cached by torch's allocator.
    """
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
