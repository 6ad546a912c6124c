"""Progress of a quantizer run: bytes done, speed and time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SCAN = "scan"
QUANTIZE = "quantize"


@dataclass(frozen=True)
class QuantizeProgress:
    """The state of a run after one tensor.

    phase: `SCAN` (bytes read in the search for NaN) or `QUANTIZE` (bytes of the store written).
    left_s: estimated seconds left in the phase.
    """

    phase: str
    component: str
    tensor: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    left_s: float


ProgressCallback = Callable[[QuantizeProgress], None]


class Meter:
    """Counts the bytes of one phase and reports each tensor to `callback`."""

    def __init__(self, phase: str, total_bytes: int, callback: ProgressCallback | None) -> None:
        self._phase = phase
        self._total_bytes = total_bytes
        self._callback = callback
        self._start_s = time.monotonic()
        self._skipped_bytes = 0
        self._done_bytes = 0

    def skip(self, nbytes: int) -> None:
        """Count bytes of an earlier run as done, without an effect on the speed."""
        self._skipped_bytes += nbytes

    def advance(self, component: str, tensor: str, nbytes: int) -> None:
        """Count a finished tensor and report it."""
        self._done_bytes += nbytes
        if self._callback is None:
            return
        done = self._skipped_bytes + self._done_bytes
        speed = self._done_bytes / max(time.monotonic() - self._start_s, 1e-9)
        left_s = (self._total_bytes - done) / speed if speed else 0.0
        self._callback(
            QuantizeProgress(self._phase, component, tensor, done, self._total_bytes, speed, left_s)
        )
