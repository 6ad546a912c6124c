"""The hops in memory, from RAM through staging into a device slot, ordered by events and never by a
device-wide synchronisation.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class Transport(Protocol):
    """How bytes reach a device. `staged`: they pass through host buffers; otherwise the disk is
    read into the slot itself.
    """

    staged: bool

    def pin(self, buffer: Tensor) -> bool:
        """Page-locks host memory for copies that run beside everything else; False where the driver
        refuses.
        """

    def unpin(self, buffer: Tensor) -> None:
        """Undoes `pin`; no copy from the buffer may be under way."""

    def begin(self) -> None:
        """Copies issued from now on wait for the work issued so far on the computing stream: it may
        still use the slots' memory.
        """

    def stage(self, source: Tensor, staging: Tensor) -> None:
        """staging = source, both in host memory, in the calling thread."""

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> object | None:
        """Begins slot[:n] = host once `after` has happened; returns the event of its end."""

    def mark(self) -> object | None:
        """An event after all work issued so far on the computing stream."""

    def wait(self, event: object | None) -> None:
        """Makes the computing stream wait for `event`, without blocking the host where the device
        allows.
        """

    def settle(self, event: object | None) -> None:
        """Blocks the host until `event` has happened: its buffer may then be written again."""


class HostTransport:
    """A device that is the host: copies happen in line and every event is already over. Nothing
    needs locked pages.
    """

    staged = False

    def pin(self, buffer: Tensor) -> bool:
        return True

    def unpin(self, buffer: Tensor) -> None:
        return None

    def begin(self) -> None:
        return None

    def stage(self, source: Tensor, staging: Tensor) -> None:
        staging.copy_(source)

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> object | None:
        slot[: host.numel()].copy_(host)
        return None

    def mark(self) -> object | None:
        return None

    def wait(self, event: object | None) -> None:
        return None

    def settle(self, event: object | None) -> None:
        return None


class CudaTransport:
    """A CUDA device: its own stream for copies, events between it and the computing stream.

    Pages are locked in place (cudaHostRegister), not taken from torch's pinned allocator, which
    rounds sizes up to powers of two and
    keeps what is freed: the RAM budget counts the bytes that are really held.
    """

    staged = True

    def __init__(self, device: torch.device) -> None:
        # The streamer's threads begin on device 0, where a call that does not name its device would
        # make a context.
        self._device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        self._stream = torch.cuda.Stream(self._device)
        self._computing = torch.cuda.current_stream(self._device)

    def pin(self, buffer: Tensor) -> bool:
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)) == 0:
                return True
            self._clear_error()
        return False

    def unpin(self, buffer: Tensor) -> None:
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))
            if code != 0:
                self._clear_error()
                _log.warning(
                    "the driver did not unlock %d bytes of host memory (CUDA error %d)",
                    buffer.numel(),
                    code,
                )

    def _clear_error(self) -> None:
        """A refusal stays the thread's last error until a launch's check takes it off: left there,
        an innocent kernel would raise it.
        """
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def begin(self) -> None:
        self._stream.wait_stream(self._computing)

    def stage(self, source: Tensor, staging: Tensor) -> None:
        staging.copy_(source)

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> torch.cuda.Event:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            slot[: host.numel()].copy_(host, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # who settles on it sleeps instead of spinning
            event.record(self._stream)
        return event

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._computing)
        return event

    def wait(self, event: object | None) -> None:
        if isinstance(event, torch.cuda.Event):
            self._computing.wait_event(event)

    def settle(self, event: object | None) -> None:
        if isinstance(event, torch.cuda.Event):
            with torch.cuda.device(self._device):
                event.synchronize()


def make_transport(device: torch.device) -> Transport:
    return CudaTransport(device) if device.type == "cuda" else HostTransport()
