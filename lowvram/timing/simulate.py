"""Simulate the streamer: start and end of each read, copy and computation of a schedule. No torch.

The rules are those of `streaming.streamer`. Disk, copies within the host and the link each have a
worker that processes the visits in order; the link and the computation are queues of the device.
Dependencies come from the visits: `stage_after` and `host_after` for the last copy out of a buffer,
`after` for the computation that used a slot. A computation waits for its block's copy and for the
computation before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowvram.streaming.schedule import NEVER, Visit


@dataclass(frozen=True)
class HopSpeeds:
    """Bytes per second of every hop. staged: the device's memory is not the host's (as in
    `transport.Transport`).
    """

    disk_bytes_s: float
    host_copy_bytes_s: float
    link_bytes_s: float
    staged: bool = True


class VisitTimes(NamedTuple):
    """Times of one visit in seconds from the start; start and end of an unused hop are equal.

    read: from the disk; stage: from pageable RAM into a staging buffer.
    issued_s: when the copy into the slot is issued; copy: when it runs.
    released_s: when the host continues, after which the next copy into the slot can be issued.
    """

    read_start_s: float
    read_end_s: float
    stage_start_s: float
    stage_end_s: float
    issued_s: float
    copy_start_s: float
    copy_end_s: float
    compute_start_s: float
    compute_end_s: float
    released_s: float


@dataclass(frozen=True)
class Timeline:
    """Simulated times of all visits in order, and the bytes moved by each hop.

    stall_s: idle time of the computation before each visit.
    """

    visits: tuple[VisitTimes, ...]
    stall_s: tuple[float, ...]
    read_bytes: int
    host_copy_bytes: int
    link_bytes: int

    @property
    def seconds(self) -> float:
        """End of the last computation."""
        return self.visits[-1].compute_end_s if self.visits else 0.0


def simulate(
    visits: Sequence[Visit],
    block_bytes: int,
    compute_s: float | Sequence[float],
    speeds: HopSpeeds,
    step_starts: frozenset[int] = frozenset(),
) -> Timeline:
    """Simulate the schedule.

    compute_s: computing time of each visit, or one for all.
    step_starts: indices of visits before which the host waits for the device, as it does after each
    denoising step.
    """
    every_s = [float(compute_s)] * len(visits) if isinstance(compute_s, (int, float)) else compute_s
    read_s, stage_s, link_s = (
        block_bytes / rate
        for rate in (speeds.disk_bytes_s, speeds.host_copy_bytes_s, speeds.link_bytes_s)
    )
    times: list[VisitTimes] = []
    disk = staging = linking = link_free = issuing = compute_free = 0.0
    stalls: list[float] = []
    reads = stagings = copies = 0
    for number, visit in enumerate(visits):
        read_start = read_end = disk
        stage_start = stage_end = staging
        issued = copy_start = copy_end = linking
        straight = visit.host is None and visit.stage is None
        if visit.load:
            ready = 0.0
            left = times[visit.stage_after].copy_end_s if visit.stage_after != NEVER else 0.0
            if visit.read and not straight:
                free = left if visit.host is None else _host_free(visits, times, visit.host_after)
                read_start = max(disk, free)
                ready = read_end = disk = read_start + read_s
            if visit.stage is not None and visit.host is not None:
                stage_start = max(staging, ready, left)
                ready = stage_end = staging = stage_start + stage_s
                stagings += 1
            released, computed = 0.0, 0.0
            if visit.after != NEVER:
                released, computed = times[visit.after].released_s, times[visit.after].compute_end_s
            issued = max(linking, ready, released)
            if straight:  # read from the disk into the slot
                read_start = max(issued, disk)
                copy_start = copy_end = issued = read_end = disk = read_start + read_s
            elif speeds.staged:
                copy_start = max(issued, link_free, computed)
                copy_end = link_free = copy_start + link_s
            else:  # the worker copies within host memory
                copy_start = issued
                copy_end = copy_start + stage_s
            linking = issued if speeds.staged else copy_end
            reads += visit.read
            copies += not straight
        if number in step_starts:
            issuing = max(issuing, compute_free)
        if visit.load:
            issuing = max(issuing, linking)
        start = max(issuing, compute_free, copy_end if visit.load else 0.0)
        stalls.append(start - compute_free)
        compute_free = start + every_s[number]
        if not speeds.staged:
            issuing = compute_free
        times.append(
            VisitTimes(
                read_start,
                read_end,
                stage_start,
                stage_end,
                issued,
                copy_start,
                copy_end,
                start,
                compute_free,
                issuing,
            )
        )
    return Timeline(
        tuple(times),
        tuple(stalls),
        reads * block_bytes,
        stagings * block_bytes,
        copies * block_bytes,
    )


def _host_free(visits: Sequence[Visit], times: Sequence[VisitTimes], host_after: int) -> float:
    """When the previous block of a RAM buffer has been copied out of it.

    A pageable buffer is copied to staging, a pinned one to the slot.
    """
    if host_after == NEVER:
        return 0.0
    return (
        times[host_after].copy_end_s
        if visits[host_after].stage is None
        else times[host_after].stage_end_s
    )
