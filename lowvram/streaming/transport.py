"""Copies from RAM through staging into device slots, ordered by events."""

from __future__ import annotations

import contextlib
import logging
from typing import Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class Transport(Protocol):
    """Copies of blocks to a device.

    staged: blocks pass through host buffers; otherwise they are read from disk into the slots.
    """

    staged: bool

    def pin(self, buffer: Tensor) -> bool:
        """Page-lock host memory for asynchronous copies; False when the driver refuses."""

    def unpin(self, buffer: Tensor) -> None:
        """Undo `pin`; no copy from the buffer may be in progress."""

    def begin(self) -> None:
        """Make later copies wait for all work issued so far on the compute stream.

        That work may still use the memory of the slots.
        """

    def stage(self, source: Tensor, staging: Tensor) -> None:
        """staging = source, both in host memory, in the calling thread."""

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> object | None:
        """Issue slot[:n] = host, to run after the event `after`; returns the event of its end."""

    def mark(self) -> object | None:
        """Record an event after all work issued so far on the compute stream."""

    def wait(self, event: object | None) -> None:
        """Make the compute stream wait for `event`, without blocking the host if possible."""

    def settle(self, event: object | None) -> None:
        """Block the host until `event` has happened, after which its buffer may be overwritten."""


class HostTransport:
    """Transport for a CPU as the device: copies are synchronous, and there are no events."""

    staged = False

    def pin(self, buffer: Tensor) -> bool:
        """Return True; nothing needs page-locked memory."""
        return True

    def unpin(self, buffer: Tensor) -> None:
        """Do nothing."""
        return None

    def begin(self) -> None:
        """Do nothing: all work is complete when it returns."""
        return None

    def stage(self, source: Tensor, staging: Tensor) -> None:
        """staging = source, in the calling thread."""
        staging.copy_(source)

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> object | None:
        """slot[:n] = host, in the calling thread."""
        slot[: host.numel()].copy_(host)
        return None

    def mark(self) -> object | None:
        """Return None; there are no events."""
        return None

    def wait(self, event: object | None) -> None:
        """Do nothing; there are no events."""
        return None

    def settle(self, event: object | None) -> None:
        """Do nothing; there are no events."""
        return None


class CudaTransport:
    """Transport for a CUDA device: a copy stream, synchronized with the compute stream by events.

    Buffers are page-locked in place (cudaHostRegister). torch's pinned allocator would round sizes
    up to powers of two and keep freed memory, which the RAM budget does not include.
    """

    staged = True

    def __init__(self, device: torch.device) -> None:
        # The streamer's threads start on device 0, where a call without a device would create a
        # context.
        self._device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        self._stream = torch.cuda.Stream(self._device)
        self._computing = torch.cuda.current_stream(self._device)

    def pin(self, buffer: Tensor) -> bool:
        """Page-lock a buffer in place; False when the driver refuses."""
        with torch.cuda.device(self._device):
            if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)) == 0:
                return True
            self._clear_error()
        return False

    def unpin(self, buffer: Tensor) -> None:
        """Undo `pin`; logs a warning when the driver fails."""
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
        """Clear the thread's last CUDA error, which the next kernel launch would raise."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def begin(self) -> None:
        """Make the copy stream wait for all work issued so far on the compute stream."""
        self._stream.wait_stream(self._computing)

    def stage(self, source: Tensor, staging: Tensor) -> None:
        """staging = source, both in host memory, in the calling thread."""
        staging.copy_(source)

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> torch.cuda.Event:
        """Issue slot[:n] = host on the copy stream, after `after`; returns the event of its end."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            slot[: host.numel()].copy_(host, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # `settle` sleeps instead of spinning
            event.record(self._stream)
        return event

    def mark(self) -> torch.cuda.Event:
        """Record an event after all work issued so far on the compute stream."""
        event = torch.cuda.Event()
        event.record(self._computing)
        return event

    def wait(self, event: object | None) -> None:
        """Make the compute stream wait for `event`; does not block the host."""
        if isinstance(event, torch.cuda.Event):
            self._computing.wait_event(event)

    def settle(self, event: object | None) -> None:
        """Block the host until `event` has happened."""
        if isinstance(event, torch.cuda.Event):
            with torch.cuda.device(self._device):
                event.synchronize()


def make_transport(device: torch.device) -> Transport:
    """The transport for a device."""
    return CudaTransport(device) if device.type == "cuda" else HostTransport()
