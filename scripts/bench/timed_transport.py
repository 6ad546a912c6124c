"""Transports, and a streamer over them, that note when every copy and every block's computation
began and ended.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowvram.streaming.block import Blocks, BlockView
from lowvram.streaming.transport import CudaTransport, HostTransport
from scripts.bench.timeline import TimedVisit, Timeline


class Marks(ABC):
    """The moments that a timed transport and a timed streamer note: events of a device, or seconds
    of the host's clock.
    """

    def __init__(self) -> None:
        self.copied: list[tuple[Any, Any]] = []
        self.visited: list[tuple[str, int, Any, Any, Any]] = []

    @abstractmethod
    def tick(self) -> Any:
        """The moment at which all work issued so far on the computing stream is over."""

    @abstractmethod
    def seconds(self, first: Any, second: Any) -> float:
        """From one moment to another; negative where the second came earlier."""

    @abstractmethod
    def finish(self) -> None:
        """Waits until every moment has come."""

    def timeline(self) -> Timeline:
        self.finish()
        if not self.visited:
            return Timeline()
        origin = self.visited[0][2]
        first = min([0.0, *(self.seconds(origin, start) for start, _ in self.copied)])

        def since_first(moment: Any) -> float:
            return self.seconds(origin, moment) - first

        return Timeline(
            [(since_first(start), since_first(end)) for start, end in self.copied],
            [
                TimedVisit(name, index, since_first(asked), since_first(start), since_first(end))
                for name, index, asked, start, end in self.visited
            ],
        )


class TimedStreamer:
    """A streamer whose visits are noted in `marks`: when a block was asked for, when it was there,
    and when it was computed.

    The moment of asking is marked before the streamer is entered: it may hold the host back until a
    copy can be issued, and on a GPU that has run dry a mark behind that would come after the stall.
    Blocks that are on the device already are noted like all others.
    """

    def __init__(self, streamer: Blocks, marks: Marks) -> None:
        self._streamer, self._marks = streamer, marks

    @contextmanager
    def block(self, component: str, index: int) -> Iterator[BlockView]:
        asked = self._marks.tick()
        with self._streamer.block(component, index) as view:
            start = self._marks.tick()
            yield view
            self._marks.visited.append((component, index, asked, start, self._marks.tick()))


class TimedCuda(CudaTransport, Marks):
    """Events with times around every copy, and on the computing stream."""

    def __init__(self, device: torch.device) -> None:
        CudaTransport.__init__(self, device)
        Marks.__init__(self)

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> torch.cuda.Event:
        start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            start.record(self._stream)
            slot[: host.numel()].copy_(host, non_blocking=True)
            end.record(self._stream)
        self.copied.append((start, end))
        return end

    def tick(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._computing)
        return event

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        milliseconds: float = first.elapsed_time(second)
        return milliseconds / 1e3

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)


class TimedHost(HostTransport, Marks):
    """The same on a CPU, through staging buffers as on a GPU; copies run in line."""

    staged = True

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> None:
        start = self.tick()
        super().copy(host, slot, after)
        self.copied.append((start, self.tick()))

    def tick(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def finish(self) -> None:
        """All work was done in line."""
