"""When the copies and visits of one stream began and ended, and how long visits waited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TimedVisit:
    """One use of a block, in seconds: all work before it was over at `asked_s`, its bytes had come
    at `start_s`, it was done at `end_s`.
    """

    component: str
    index: int
    asked_s: float
    start_s: float
    end_s: float

    @property
    def stall_s(self) -> float:
        return self.start_s - self.asked_s


@dataclass
class Timeline:
    """When copies and visits of one stream began and ended, in seconds from its first event.
    Between visits there is other work.
    """

    copies: list[tuple[float, float]] = field(default_factory=list)
    visits: list[TimedVisit] = field(default_factory=list)


def stall_seconds(visits: Sequence[TimedVisit]) -> float:
    """How long the computation waited for the bytes of these visits."""
    return sum(visit.stall_s for visit in visits)
