"""The last hop, from host memory into a device slot, ordered by events and never by a device-wide synchronisation."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Transport(Protocol):
    """How bytes reach a device. `staged`: they pass through host buffers; otherwise the disk is read into the slot itself."""

    staged: bool

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> object | None:
        """Begins slot[:n] = host once `after` has happened; returns the event of its end."""

    def mark(self) -> object | None:
        """An event after all work issued so far on the computing stream."""

    def wait(self, event: object | None) -> None:
        """Makes the computing stream wait for `event`, without blocking the host where the device allows."""

    def settle(self, event: object | None) -> None:
        """Blocks the host until `event` has happened: its buffer may then be written again."""


class HostTransport:
    """A device that is the host: copies happen in line and every event is already over."""

    staged = False

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> None:
        slot[: host.numel()].copy_(host)

    def mark(self) -> None:
        return None

    def wait(self, event: object | None) -> None:
        return None

    def settle(self, event: object | None) -> None:
        return None


class CudaTransport:
    """A CUDA device: its own stream for copies, events between it and the computing stream."""

    staged = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._computing = torch.cuda.current_stream(device)

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            slot[: host.numel()].copy_(host, non_blocking=True)
            event = torch.cuda.Event()
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
            event.synchronize()


def make_transport(device: torch.device) -> Transport:
    return CudaTransport(device) if device.type == "cuda" else HostTransport()
