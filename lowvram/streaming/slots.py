"""The device memory that blocks land in, and the host memory that they pass through: equal buffers,
made and handed back together.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from lowvram.memory.arena import Ledger

_log = logging.getLogger(__name__)


class Pinner(Protocol):
    """Locks and unlocks the pages of host memory."""

    def pin(self, buffer: Tensor) -> bool: ...

    def unpin(self, buffer: Tensor) -> None: ...


class Slots:
    """`count` buffers of `slot_bytes` each, taken from one budget at once and handed back together.

    `pinned`: numbers of the buffers that are page-locked. Raises `OutOfMemoryError` and keeps
    nothing where one cannot be had.
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
        """Page-locks the first `count` buffers; where the driver refuses one, it and those after it
        stay pageable.
        """
        self._pinner = pinner
        for number, buffer in enumerate(self._buffers[:count]):
            try:
                locked, reason = pinner.pin(buffer), "the driver's limit is reached"
            except (RuntimeError, OSError) as error:
                locked, reason = False, str(error)
            if not locked:
                refused = f"{self._label} {number} to {count - 1}"
                _log.warning(
                    "page-locking %s was refused (%s): pageable now, slower and with the "
                    "same result",
                    refused,
                    reason,
                )
                return
            self.pinned.add(number)

    def close(self) -> None:
        for number in sorted(self.pinned):
            if self._pinner is not None:
                self._pinner.unpin(self._buffers[number])
        self.pinned = set()
        for buffer in self._buffers:
            self._ledger.release(buffer.numel())
        self._buffers = []
