"""Recognise out-of-memory errors, try again after them, and release memory that nobody uses."""

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
    """Whatever error is about memory leaves as `OutOfMemoryError`, with its first line and the
    budget that is short; others pass.

    Leave the handler before trying again: the error holds the frames below it, and they the memory.
    """
    try:
        yield
    except (OutOfMemoryError, RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(first_line, short_budget(error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had: of the driver, of torch's allocators, of a library under
    them, of Python or of the system.
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
    """Returns what nothing refers to any more: Python's cycles, and what torch's allocator keeps of
    the device for later.
    """
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
