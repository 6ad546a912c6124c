"""What a running job tells whoever watches: one event type, and the time left estimated from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `phase` are over; `seconds_left` is None until one unit has been
    timed.
    """

    phase: str
    done: int
    total: int
    seconds_left: float | None
    detail: str = ""


Listener = Callable[[Progress], None]


def silent(event: Progress) -> None:
    """A listener that ignores everything."""


class PhaseClock:
    """Reports one phase: the time left is the mean time of the units done here, times those that
    remain.
    """

    def __init__(self, listener: Listener, phase: str, total: int, first: int = 0) -> None:
        self._listener, self._phase, self._total, self._first = listener, phase, total, first
        self._began = time.monotonic()
        self.report(first)

    def report(self, done: int, detail: str = "") -> None:
        finished = done - self._first
        left = (
            (time.monotonic() - self._began) / finished * (self._total - done)
            if finished > 0
            else None
        )
        self._listener(Progress(self._phase, done, self._total, left, detail))
