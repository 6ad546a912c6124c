"""The streamer's order of events on a device whose clock is simulated: hops overlap, and no buffer
is written while it is in use.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lowvram.memory.arena import Ledger
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import NEVER, BlockId, Visit, assign_slots
from lowvram.streaming.slots import Slots
from lowvram.streaming.streamer import StreamedComponent, Streamer

BLOCKS, NBYTES = 5, 256
TENSORS = {"weight": (torch.uint8, (NBYTES,), 0)}
CPU = torch.device("cpu")
FIRST = {"high": 1, "low": 101}


@dataclass(frozen=True)
class Durations:
    """Seconds of one block on each hop."""

    read_s: float
    stage_s: float
    copy_s: float
    compute_s: float


@dataclass(frozen=True)
class Moment:
    """An event of the simulated device: it happens at `at_s` of its clock."""

    at_s: float


@dataclass
class Use:
    """A buffer is filled, read from or computed with, between two moments."""

    what: str
    buffer: int
    start_s: float
    end_s: float


@dataclass
class Clock:
    """One simulated machine. A thread's own time moves on when it works and when it settles on an
    event; streams have their own times.

    Every value that crosses threads travels with the moment it was ready at, so the result does not
    depend on how the threads run.
    """

    durations: Durations
    rng: random.Random
    uses: list[Use] = field(default_factory=list)
    # when a buffer's present content was complete
    ready_s: dict[int, float] = field(default_factory=dict)
    link_s: float = 0.0
    compute_s: float = 0.0
    mine: threading.local = field(default_factory=threading.local)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        return float(getattr(self.mine, "at_s", 0.0))

    def advance(self, to_s: float) -> None:
        self.mine.at_s = max(self.now(), to_s)

    def work(
        self, what: str, seconds: float, target: torch.Tensor, source: torch.Tensor | None = None
    ) -> None:
        """The calling thread fills `target`, out of `source` where there is one."""
        jitter(self.rng)
        with self.lock:
            if source is not None:
                self.advance(self.ready_s[source.data_ptr()])
            start_s = self.now()
            self.advance(start_s + seconds)
            self.ready_s[target.data_ptr()] = self.now()
            self.uses.append(Use(what, target.data_ptr(), start_s, self.now()))
            if source is not None:
                self.uses.append(Use(f"{what} from", source.data_ptr(), start_s, self.now()))


def jitter(rng: random.Random) -> None:
    """A real pause, so that the threads meet in another order each time."""
    if rng.random() < 0.3:
        time.sleep(rng.random() * 1e-4)


class SimulatedFile(BlockFile):
    """A disk that takes its time; every byte of a block tells which one it is."""

    def __init__(self, clock: Clock, name: str) -> None:
        self._first = FIRST[name]
        self.path, self.ranges, self._clock = (
            Path(name),
            [(index * NBYTES, NBYTES) for index in range(BLOCKS)],
            clock,
        )

    def read_into(self, block: int, buffer: torch.Tensor) -> torch.Tensor:
        self._clock.work("read", self._clock.durations.read_s, buffer)
        return buffer[:NBYTES].fill_(self._first + block)

    def stop(self) -> None:
        return None


class SimulatedDevice:
    """A GPU with one stream for copies and one for kernels: issuing returns at once, and work
    starts when what it waits for is over.
    """

    staged = True

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.copies: list[tuple[float, float]] = []

    def pin(self, buffer: torch.Tensor) -> bool:
        return True

    def unpin(self, buffer: torch.Tensor) -> None:
        return None

    def begin(self) -> None:
        return None

    def stage(self, source: torch.Tensor, staging: torch.Tensor) -> None:
        self._clock.work("stage", self._clock.durations.stage_s, staging, source)
        staging.copy_(source)

    def copy(self, host: torch.Tensor, slot: torch.Tensor, after: object | None) -> Moment:
        jitter(self._clock.rng)
        clock = self._clock
        with clock.lock:
            free_s = after.at_s if isinstance(after, Moment) else 0.0
            start_s = max(clock.link_s, free_s, clock.ready_s[host.data_ptr()])
            clock.link_s = end_s = start_s + clock.durations.copy_s
            clock.uses += [
                Use("copy", slot.data_ptr(), start_s, end_s),
                Use("copy from", host.data_ptr(), start_s, end_s),
            ]
            self.copies.append((start_s, end_s))
        slot[:NBYTES].copy_(host)
        return Moment(end_s)

    def mark(self) -> Moment:
        return Moment(self._clock.compute_s)

    def wait(self, event: object | None) -> None:
        if isinstance(event, Moment):
            self._clock.compute_s = max(self._clock.compute_s, event.at_s)

    def settle(self, event: object | None) -> None:
        if isinstance(event, Moment):
            self._clock.advance(event.at_s)


@dataclass(frozen=True)
class Case:
    """What the planner chose, and how fast the machine is."""

    schedule: tuple[BlockId, ...]
    resident: int
    ring: int
    host: int
    pinned: int
    staging: int
    durations: Durations

    @property
    def visits(self) -> list[Visit]:
        return assign_slots(
            self.schedule,
            self.resident,
            self.ring,
            self.host,
            self.staging,
            set(range(self.pinned)),
        )


@dataclass(frozen=True)
class Trace:
    """uses: of all buffers; computed: (start, end) of each visit; copied: (start, end) of each
    load, in order.

    mistaken: the visits that found another block's bytes.
    """

    uses: list[Use]
    computed: list[tuple[float, float]]
    copied: list[tuple[float, float]]
    mistaken: list[int]

    @property
    def faults(self) -> list[str]:
        return conflicts(self.uses) + [
            f"visit {number} found another block" for number in self.mistaken
        ]


def simulate(case: Case, seed: int) -> Trace:
    """The real streamer, its three threads and all, over simulated disk, link and kernels."""
    rng, ledger = random.Random(seed), Ledger("test", 10**6)
    clock = Clock(case.durations, rng)
    device = SimulatedDevice(clock)
    slots = Slots("slot", case.resident + case.ring, NBYTES, ledger, CPU)
    host, staging = (
        Slots("cached", case.host, NBYTES, ledger, CPU),
        Slots("staging", case.staging, NBYTES, ledger, CPU),
    )
    files = {
        name: StreamedComponent(SimulatedFile(clock, name), TENSORS) for name in ("high", "low")
    }
    computed, mistaken = [], []
    with Streamer(files, case.visits, slots, host, staging, device) as streamer:
        for number, (name, index) in enumerate(case.schedule):
            jitter(rng)
            with streamer.block(name, index) as block:
                if set(block["weight"].tolist()) != {FIRST[name] + index}:
                    mistaken.append(number)
                start_s = clock.compute_s
                clock.compute_s = end_s = start_s + case.durations.compute_s
                with clock.lock:
                    clock.uses.append(Use("compute", block["weight"].data_ptr(), start_s, end_s))
                computed.append((start_s, end_s))
    return Trace(clock.uses, computed, device.copies, mistaken)


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    steps, switch = rng.randint(1, 4), rng.randint(0, 4)
    schedule = tuple(
        ("high" if step < switch else "low", index)
        for step in range(steps)
        for index in range(BLOCKS)
    )
    resident = rng.randint(0, BLOCKS)
    ring = rng.randint(1, 3) if resident < BLOCKS else 0
    host = rng.randint(0, BLOCKS - resident)
    durations = Durations(
        *(rng.choice((0.1, 0.5, 1.0, 3.0)) * (1 + rng.random()) for _ in range(4))
    )
    return Case(schedule, resident, ring, host, rng.randint(0, host), rng.randint(1, 3), durations)


def conflicts(uses: list[Use]) -> list[str]:
    """Pairs of uses of one buffer that overlap in time where at least one of them writes."""
    found = []
    for buffer in {use.buffer for use in uses}:
        mine = sorted(
            (use for use in uses if use.buffer == buffer), key=lambda use: (use.start_s, use.end_s)
        )
        for first, second in pairwise(mine):
            writes = {"read", "stage", "copy"} & {first.what, second.what}
            if writes and second.start_s < first.end_s - 1e-9:
                found.append(
                    f"{second.what} at {second.start_s:.3f} s while {first.what} runs until "
                    f"{first.end_s:.3f} s"
                )
    return found


def ideal(case: Case) -> list[float]:
    """When every visit's computation ends when each hop begins as soon as its bytes, its worker and
    its buffer allow.
    """
    visits, d = case.visits, case.durations
    disk_s = stage_s = link_s = compute_s = 0.0
    in_host: dict[int, float] = {}
    staged: dict[int, float] = {}
    linked: dict[int, float] = {}
    computed: list[float] = []
    for number, visit in enumerate(visits):
        through_host = visit.stage is not None and visit.host is not None
        if visit.read:
            if visit.host is not None:
                before = visit.host_after
                free_s = (
                    0.0 if before == NEVER else staged[before] if through_host else linked[before]
                )
                in_host[visit.host] = disk_s = max(disk_s, free_s) + d.read_s
            else:
                disk_s = max(disk_s, linked.get(visit.stage_after, 0.0)) + d.read_s
        if visit.load:
            ready_s = in_host[visit.host] if visit.host is not None else disk_s
            if through_host:
                staged[number] = stage_s = (
                    max(stage_s, ready_s, linked.get(visit.stage_after, 0.0)) + d.stage_s
                )
                ready_s = stage_s
            free_s = computed[visit.after] if visit.after != NEVER else 0.0
            linked[number] = link_s = max(link_s, ready_s, free_s) + d.copy_s
            compute_s = max(compute_s, link_s)
        compute_s += d.compute_s
        computed.append(compute_s)
    return computed


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_no_buffer_is_written_in_use_and_nothing_waits_without_need(first: int) -> None:
    for seed in range(first, first + 50):
        case = random_case(seed)
        trace = simulate(case, seed)
        assert trace.faults == [], case
        assert [end_s for _, end_s in trace.computed] == pytest.approx(ideal(case)), case


def streamed(durations: Durations, ring: int = 2, steps: int = 3, **changes: int) -> Case:
    schedule = tuple(
        ("high" if step < 2 else "low", index) for step in range(steps) for index in range(BLOCKS)
    )
    return Case(
        schedule,
        0,
        ring,
        changes.get("host", 0),
        changes.get("pinned", 0),
        changes.get("staging", 2),
        durations,
    )


def test_a_block_travels_while_the_one_before_it_computes() -> None:
    """Also the next expert's first block, while the last step of this one runs: after the first
    block the device never waits.
    """
    trace = simulate(streamed(Durations(0.5, 0.2, 0.3, 1.0)), seed=1)
    for (start_s, _), (_, end_s) in zip(trace.copied[1:], trace.computed, strict=False):
        assert start_s < end_s
    switch = 2 * BLOCKS
    assert trace.copied[switch][1] <= trace.computed[switch - 1][1]
    starts = [start_s for start_s, _ in trace.computed]
    assert starts == pytest.approx([0.8 + number for number in range(len(starts))])


def test_the_disk_reads_ahead_of_the_link_as_far_as_staging_allows() -> None:
    """With one staging buffer each read waits for the copy before it; with two, reads follow each
    other.
    """
    slow_link = Durations(1.0, 0.1, 1.0, 0.1)
    for staging, period_s in ((1, 2.0), (2, 1.0)):
        trace = simulate(streamed(slow_link, staging=staging), seed=staging)
        reads = [use.start_s for use in trace.uses if use.what == "read"]
        assert [b - a for a, b in pairwise(reads[1:])] == pytest.approx(
            [period_s] * (len(reads) - 2)
        )


def test_pageable_blocks_are_staged_while_the_disk_reads_others() -> None:
    """Two of five blocks lie in pageable RAM: their host copies take none of the disk's time."""
    case = streamed(Durations(1.0, 0.9, 0.1, 0.1), ring=3, steps=2, host=2, staging=3)
    trace = simulate(case, seed=3)
    reads = sorted(use.start_s for use in trace.uses if use.what == "read")
    assert len(reads) == 2 * BLOCKS - 2  # the second step finds two blocks in RAM
    assert trace.computed[-1][1] < len(reads) * 1.0 + 1.5


def test_pinned_blocks_pass_no_staging() -> None:
    trace = simulate(streamed(Durations(1.0, 1.0, 0.2, 0.5), host=BLOCKS, pinned=BLOCKS), seed=4)
    assert not [use for use in trace.uses if use.what == "stage"]


FORGETS: dict[str, Callable[[Visit], dict[str, int]]] = {
    "the slot's last visit": lambda visit: {"after": NEVER},
    "the staging buffer's last copy": lambda visit: {"stage_after": NEVER},
    "the RAM buffer's last copy": lambda visit: {"host_after": NEVER},
}


@pytest.mark.parametrize("forgotten", FORGETS)
def test_an_ordering_that_forgets_to_wait_is_caught(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    durations = Durations(0.1, 0.1, 0.5, 3.0)
    case = (
        streamed(durations, host=BLOCKS, pinned=BLOCKS)
        if "RAM" in forgotten
        else streamed(durations)
    )
    assert simulate(case, 0).faults == []
    faulty = [replace(visit, **FORGETS[forgotten](visit)) for visit in case.visits]  # type: ignore[arg-type]
    monkeypatch.setattr(Case, "visits", faulty)
    assert simulate(case, 0).faults
