"""Transports that note when every copy and every block's computation began and ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lowvram.streaming.transport import CudaTransport, HostTransport


@dataclass
class Timeline:
    """When copies and computations of one run began and ended, in seconds from its first event."""

    copies: list[tuple[float, float]] = field(default_factory=list)
    computations: list[tuple[float, float]] = field(default_factory=list)


class TimedCuda(CudaTransport):
    """Events with times around every copy and at the start of every block's computation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.copied: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.computed: list[torch.cuda.Event] = []

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

    def wait(self, event: object | None) -> None:
        super().wait(event)
        start = torch.cuda.Event(enable_timing=True)
        start.record(self._computing)
        self.computed.append(start)

    def timeline(self) -> Timeline:
        torch.cuda.synchronize()
        if not self.copied or not self.computed:
            return Timeline()
        origin = self.copied[0][0]
        starts = [origin.elapsed_time(event) / 1e3 for event in self.computed]
        copies = [(origin.elapsed_time(start) / 1e3, origin.elapsed_time(end) / 1e3) for start, end in self.copied]
        return Timeline(copies, list(pairwise(starts)))


class TimedHost(HostTransport):
    """The same on a CPU, through staging buffers as on a GPU; copies run in line."""

    staged = True

    def __init__(self) -> None:
        self._times = Timeline()
        self._starts: list[float] = []

    def copy(self, host: Tensor, slot: Tensor, after: object | None) -> None:
        start_s = time.perf_counter()
        super().copy(host, slot, after)
        self._times.copies.append((start_s, time.perf_counter()))

    def wait(self, event: object | None) -> None:
        self._starts.append(time.perf_counter())

    def timeline(self) -> Timeline:
        begun = min([start for start, _ in self._times.copies] + self._starts, default=0.0)
        starts = [start - begun for start in self._starts]
        return Timeline([(a - begun, b - begun) for a, b in self._times.copies], list(pairwise(starts)))
