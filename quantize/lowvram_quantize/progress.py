"""How far a run is, for whoever shows it: bytes, speed and time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SCAN = "scan"
QUANTIZE = "quantize"


@dataclass(frozen=True)
class Progress:
    """One tensor is done. `phase`: `scan` counts bytes read in search of NaN, `quantize` bytes of
    the store written.
    """

    phase: str
    component: str
    tensor: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    left_s: float


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Counts the bytes of one phase; what an earlier run did (`skip`) counts as done, but not as
    speed.
    """

    def __init__(self, phase: str, total_bytes: int, callback: ProgressCallback | None) -> None:
        self._phase = phase
        self._total_bytes = total_bytes
        self._callback = callback
        self._start_s = time.monotonic()
        self._skipped_bytes = 0
        self._done_bytes = 0

    def skip(self, nbytes: int) -> None:
        self._skipped_bytes += nbytes

    def advance(self, component: str, tensor: str, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._callback is None:
            return
        done = self._skipped_bytes + self._done_bytes
        speed = self._done_bytes / max(time.monotonic() - self._start_s, 1e-9)
        left_s = (self._total_bytes - done) / speed if speed else 0.0
        self._callback(
            Progress(self._phase, component, tensor, done, self._total_bytes, speed, left_s)
        )
