"""The fault injector: chosen calls of a function raise, all others are real."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch

from lowvram.memory import arena

# Whether a call fails, from its number (0 is the first that counts) and its arguments; an exception
# is raised in place of the usual one.
Fails = Callable[..., "bool | BaseException | None"]
FAST_RETRIES_S = (1e-4, 1e-4, 1e-4)


def cuda_error() -> Exception:
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 336.00 MiB. GPU 0 has a total capacity of 8.00 GiB"
    )


def cpu_error() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1 bytes"
    )


def python_error() -> Exception:
    return MemoryError()


def io_error() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def no_memory() -> OSError:
    return OSError(errno.ENOMEM, "Cannot allocate memory")


def always(number: int, *arguments: Any) -> bool:
    return True


def never(number: int, *arguments: Any) -> bool:
    return False


def at(*numbers: int) -> Fails:
    """The calls of these numbers."""
    return lambda number, *arguments: number in numbers


def first(count: int) -> Fails:
    """The first `count` calls."""
    return lambda number, *arguments: number < count


class Injection:
    """Replaces `owner.name` as long as `patch` lasts. calls: that counted; failures: that raised.

    error: makes the exception, or raises it itself; fails: which calls; counts: which calls have a
    number at all; after: the real function runs first, so that its result is alive.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        error: Callable[[], BaseException] = cuda_error,
        fails: Fails = always,
        *,
        counts: Callable[..., bool] = lambda *arguments: True,
        after: bool = False,
    ) -> None:
        self.calls = self.failures = 0
        self.fails = fails
        self._error, self._lock = error, threading.Lock()
        real = getattr(owner, name)

        @wraps(real)
        def injected(*arguments: Any, **named: Any) -> Any:
            if not counts(*arguments):
                return real(*arguments, **named)
            with self._lock:
                number, self.calls = self.calls, self.calls + 1
                failure = self.fails(number, *arguments)
                self.failures += bool(failure)
            result = real(*arguments, **named) if after else None
            if failure:
                raise failure if isinstance(failure, BaseException) else self._error()
            return result if after else real(*arguments, **named)

        patch.setattr(owner, name, injected)


class Allocator:
    """Replaces the allocator of buffers: counts them, and fails at chosen allocations.

    fails: from the number of the allocation and its bytes. live_bytes, peak_bytes: of all buffers.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        error: Callable[[], Exception] = cuda_error,
        fails: Callable[[int, int], bool] = lambda number, nbytes: False,
    ) -> None:
        self.count = self.live_bytes = self.peak_bytes = 0
        self._error, self._fails = error, fails
        self._living: dict[int, int] = {}
        patch.setattr(arena, "new_buffer", self.new_buffer)

    def living(self, nbytes: int) -> int:
        """Number of buffers of this size that live."""
        return self._living.get(nbytes, 0)

    def new_buffer(self, nbytes: int, device: torch.device) -> torch.Tensor:
        self.count += 1
        if self._fails(self.count - 1, nbytes):
            raise self._error()
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._change(nbytes, 1)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(buffer.untyped_storage(), self._change, nbytes, -1)
        return buffer

    def _change(self, nbytes: int, by: int) -> None:
        self._living[nbytes] = self.living(nbytes) + by
        self.live_bytes += by * nbytes
