"""Buffers of equal size for blocks, on the device and on the host."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from lowvram.memory.arena import Ledger

_log = logging.getLogger(__name__)


class Pinner(Protocol):
    """Pins and unpins host memory."""

    def pin(self, buffer: Tensor) -> bool:
        """Page-lock a buffer; False when the driver refuses."""
        ...

    def unpin(self, buffer: Tensor) -> None:
        """Unlock a buffer that `pin` has locked."""
        ...


class Slots:
    """`count` buffers of `slot_bytes` each, allocated and freed together.

    pinned: indices of the page-locked buffers.
    The constructor raises `OutOfMemoryError` when a buffer cannot be allocated, and frees the
    others.
    """

    def __init__(
        self, label: str, count: int, slot_bytes: int, ledger: Ledger, device: torch.device
    ) -> None:
        self._ledger = ledger
        self._label = label
        self._buffers: list[Tensor] = []
        self._pinner: Pinner | None = None
        self.pinned: set[int] = set()
        with ExitStack() as undo:
            undo.callback(self.close)
            for number in range(count):
                self._buffers.append(ledger.allocate(f"{label} {number}", slot_bytes, device))
            undo.pop_all()

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, number: int) -> Tensor:
        return self._buffers[number]

    def pin(self, count: int, pinner: Pinner) -> None:
        """Page-lock the first `count` buffers, up to the first that the driver refuses."""
        self._pinner = pinner
        for number, buffer in enumerate(self._buffers[:count]):
            try:
                locked, reason = pinner.pin(buffer), "driver limit reached"
            except (RuntimeError, OSError) as error:
                locked, reason = False, str(error)
            if not locked:
                refused = f"{self._label} {number} to {count - 1}"
                _log.warning(
                    "could not page-lock %s (%s): their copies are slower, results do not change",
                    refused,
                    reason,
                )
                return
            self.pinned.add(number)

    def close(self) -> None:
        """Unpin and free all buffers."""
        for number in sorted(self.pinned):
            if self._pinner is not None:
                self._pinner.unpin(self._buffers[number])
        self.pinned = set()
        for buffer in self._buffers:
            self._ledger.release(buffer.numel())
        self._buffers = []
