"""The device memory that blocks land in: slots for resident blocks and a ring for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.memory.arena import Ledger


class Slots:
    """`count` buffers of `slot_bytes` each, taken from one budget at once and handed back together."""

    def __init__(self, label: str, count: int, slot_bytes: int, ledger: Ledger, device: torch.device, pinned: bool = False) -> None:
        self._ledger = ledger
        self._label = label
        self._buffers = [ledger.allocate(f"{label} {number}", slot_bytes, device, pinned) for number in range(count)]

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, number: int) -> Tensor:
        return self._buffers[number]

    def close(self) -> None:
        for buffer in self._buffers:
            self._ledger.release(buffer.numel())
        self._buffers = []
