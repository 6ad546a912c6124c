"""Where a block's bytes come from: the store's file, through a RAM buffer where the plan grants one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lowvram.errors import CheckpointError


class BlockFile:
    """Reads byte ranges of one store file straight into buffers; one open file, no mapping, so nothing counts as resident."""

    def __init__(self, path: Path, ranges: list[tuple[int, int]]) -> None:
        """ranges: (start, bytes) of each block in the file."""
        self.path = path
        self.ranges = ranges
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)

    def read_into(self, block: int, buffer: Tensor) -> None:
        """Fills buffer[:nbytes] ([>= nbytes] uint8 on the CPU) with the block. Raises `CheckpointError` on a short or failing read."""
        start, nbytes = self.ranges[block]
        target: np.ndarray[Any, np.dtype[np.uint8]] = buffer.numpy()[:nbytes]
        done = 0
        while done < nbytes:
            try:
                self._file.seek(start + done)
                count = self._file.readinto(target[done:].data)
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading block {block} at byte {start + done} failed: {error.strerror}") from error
            if not count:
                raise CheckpointError(f"{self.path}: block {block} ends at byte {start + done}, expected {start + nbytes}: truncated")
            done += count

    def close(self) -> None:
        self._file.close()
