"""A model of time: when every read, copy and computation of a schedule begins and ends, by the
streamer's own rules. No torch.

Disk, copies within the host and the link each have a worker that walks the visits in order, as in
`streaming.streamer`; the link and computing are queues of the device. What waits for what is in the
visits: `stage_after` and `host_after` for a buffer's last copy, `after` for the computation that
used a slot. A computation waits for its block's copy and for the one before it.
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
    """One visit, in seconds from the start. Where a hop is not used, its start equals its end.

    read: from the disk; stage: from pageable RAM into staging; copy: into the slot, issued at
    `issued_s` and under way between the next two; compute; `released_s`: when the host goes on,
    which lets the link's worker issue the next copy into the slot.
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
    """All visits in order, and what they moved. `stall_s`: how long computing stood still before
    each visit.
    """

    visits: tuple[VisitTimes, ...]
    stall_s: tuple[float, ...]
    read_bytes: int
    host_copy_bytes: int
    link_bytes: int

    @property
    def seconds(self) -> float:
        return self.visits[-1].compute_end_s if self.visits else 0.0


def simulate(
    visits: Sequence[Visit],
    block_bytes: int,
    compute_s: float | Sequence[float],
    speeds: HopSpeeds,
    step_starts: frozenset[int] = frozenset(),
) -> Timeline:
    """Runs the schedule. compute_s: of every visit, or of each; step_starts: numbers of the visits
    before which the host waits for the device, as it does after every denoising step.
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
            if straight:  # the disk is read into the slot itself
                read_start = max(issued, disk)
                copy_start = copy_end = issued = read_end = disk = read_start + read_s
            elif speeds.staged:
                copy_start = max(issued, link_free, computed)
                copy_end = link_free = copy_start + link_s
            else:  # a copy within host memory, which its worker makes
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
    """When the block that a RAM buffer held before has left it: into staging where it is pageable,
    else into its slot.
    """
    if host_after == NEVER:
        return 0.0
    return (
        times[host_after].copy_end_s
        if visits[host_after].stage is None
        else times[host_after].stage_end_s
    )
