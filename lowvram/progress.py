"""Progress events of a run, with the estimated time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One event: `done` of `total` units of `phase` are finished. seconds_left is None until a unit
    was timed.
    """

    phase: str
    done: int
    total: int
    seconds_left: float | None
    detail: str = ""


Listener = Callable[[Progress], None]


def silent(event: Progress) -> None:
    """A listener that ignores all events."""


class PhaseClock:
    """Report the progress of one phase. Time left: the mean time of the finished units, times the
    remaining ones.
    """

    def __init__(self, listener: Listener, phase: str, total: int, first: int = 0) -> None:
        self._listener, self._phase, self._total, self._first = listener, phase, total, first
        self._began = time.monotonic()
        self.report(first)

    def report(self, done: int, detail: str = "") -> None:
        """Send an event: `done` units are finished."""
        finished = done - self._first
        left = (
            (time.monotonic() - self._began) / finished * (self._total - done)
            if finished > 0
            else None
        )
        self._listener(Progress(self._phase, done, self._total, left, detail))
