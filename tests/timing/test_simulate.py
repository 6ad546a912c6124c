"""The model of time: its arithmetic by hand, its laws over random schedules, and the real
streamer's own times on a simulated clock.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lowvram.memory.arena import Ledger
from lowvram.planner.phases import PlanChoice
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import NEVER, BlockId, Visit, assign_slots
from lowvram.streaming.slots import Slots
from lowvram.streaming.streamer import StreamedComponent, Streamer
from lowvram.timing.forecast import simulate_choice
from lowvram.timing.simulate import HopSpeeds, Timeline, simulate

NBYTES, CPU = 256, torch.device("cpu")
LOST_S = 10  # a thread that waits longer waits in vain
TENSORS = {"weight": (torch.uint8, (NBYTES,), 0)}


def two_experts(blocks: int, steps: int, switch: int) -> list[BlockId]:
    return [
        ("high" if step < switch else "low", index)
        for step in range(steps)
        for index in range(blocks)
    ]


def speeds(read_s: float, stage_s: float, copy_s: float, staged: bool = True) -> HopSpeeds:
    return HopSpeeds(NBYTES / read_s, NBYTES / stage_s, NBYTES / copy_s, staged)


# The arithmetic by hand


def test_two_slots_by_hand() -> None:
    """Read 1 s, copy 2 s, compute 5 s, one staging buffer: copies run under computations, and the
    third waits for its slot.
    """
    visits = assign_slots([("high", index) for index in range(3)], 0, 2, 0, 1)
    timeline = simulate(visits, NBYTES, 5.0, speeds(1, 1, 2))
    reads = [(times.read_start_s, times.read_end_s) for times in timeline.visits]
    copies = [(times.copy_start_s, times.copy_end_s) for times in timeline.visits]
    computed = [(times.compute_start_s, times.compute_end_s) for times in timeline.visits]
    assert reads == [(0, 1), (3, 4), (6, 7)]
    assert copies == [(1, 3), (4, 6), (8, 10)]
    assert computed == [(3, 8), (8, 13), (13, 18)]
    assert timeline.stall_s == (3, 0, 0)
    assert (
        timeline.seconds,
        timeline.read_bytes,
        timeline.link_bytes,
        timeline.host_copy_bytes,
    ) == (18, 3 * NBYTES, 3 * NBYTES, 0)


def test_one_slot_hides_nothing() -> None:
    visits = assign_slots([("high", index) for index in range(4)], 0, 1, 0, 2)
    timeline = simulate(visits, NBYTES, 5.0, speeds(1, 1, 2))
    assert timeline.stall_s == (3, 2, 2, 2)


def test_pageable_blocks_pass_through_staging_and_locked_ones_do_not() -> None:
    schedule = [("high", index) for _ in range(2) for index in range(4)]
    visits = assign_slots(schedule, 0, 2, 4, 2, range(2))
    timeline = simulate(visits, NBYTES, 10.0, speeds(1, 0.5, 2))
    staged = [times.stage_end_s - times.stage_start_s for times in timeline.visits]
    assert staged == [0.5, 0, 0.5, 0] * 2
    assert timeline.read_bytes == 4 * NBYTES
    assert timeline.host_copy_bytes == 4 * NBYTES
    assert timeline.link_bytes == 8 * NBYTES


def test_a_host_that_is_the_device_reads_into_its_slots() -> None:
    visits = assign_slots([("high", index) for index in range(3)], 0, 2, 0)
    timeline = simulate(visits, NBYTES, 5.0, speeds(1, 1, 1, staged=False))
    assert [times.read_end_s for times in timeline.visits] == [1, 2, 7]
    assert timeline.stall_s == (1, 0, 0)
    assert timeline.link_bytes == 0


# Laws over random schedules


@dataclass(frozen=True)
class Case:
    schedule: list[BlockId]
    choice: tuple[int, ...]  # resident, ring, host, pinned, staging
    speeds: HopSpeeds
    compute_s: float

    @property
    def visits(self) -> list[Visit]:
        resident, ring, host, pinned, staging = self.choice
        return assign_slots(self.schedule, resident, ring, host, staging, range(pinned))


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    blocks, steps = rng.randint(1, 6), rng.randint(1, 5)
    schedule = two_experts(blocks, steps, rng.randint(0, steps))
    resident = rng.randint(0, blocks)
    ring = rng.randint(1, 4) if resident < blocks else 0
    host = rng.randint(0, blocks - resident)
    read_s, stage_s, copy_s = (rng.choice((0.25, 0.5, 1, 2, 4, 8)) for _ in range(3))
    rates = speeds(read_s, stage_s, copy_s)
    return Case(
        schedule,
        (resident, ring, host, rng.randint(0, host), rng.randint(1, 3)),
        rates,
        rng.choice((0.5, 1.0, 4.0, 16.0)),
    )


def run_model(case: Case, step_starts: frozenset[int] = frozenset()) -> Timeline:
    return simulate(case.visits, NBYTES, case.compute_s, case.speeds, step_starts)


@pytest.mark.parametrize("seed", range(60))
def test_no_buffer_is_used_twice_at_a_time(seed: int) -> None:
    case = random_case(seed)
    visits, timeline = case.visits, run_model(case)
    for number, (visit, times) in enumerate(zip(visits, timeline.visits, strict=True)):
        assert times.read_start_s <= times.read_end_s <= times.compute_end_s
        assert timeline.stall_s[number] >= 0
        if number:
            assert times.compute_start_s >= timeline.visits[number - 1].compute_end_s
        if not visit.load:
            continue
        assert times.compute_start_s >= times.copy_end_s
        if visit.after != NEVER:
            assert times.copy_start_s >= timeline.visits[visit.after].compute_end_s
        if visit.stage_after != NEVER:
            first_write = times.read_start_s if visit.host is None else times.stage_start_s
            assert first_write >= timeline.visits[visit.stage_after].copy_end_s
    total = sum(timeline.stall_s) + len(visits) * case.compute_s
    assert timeline.seconds == pytest.approx(total)
    assert timeline.read_bytes == NBYTES * sum(visit.read for visit in visits)


@pytest.mark.parametrize("seed", range(30))
def test_faster_hops_and_more_slots_cost_no_time(seed: int) -> None:
    case = random_case(seed)
    seconds = run_model(case).seconds
    faster = Case(case.schedule, case.choice, speeds(*(0.1,) * 3), case.compute_s)
    assert run_model(faster).seconds <= seconds + 1e-9
    resident, ring, *rest = case.choice
    streamed = max(index for _, index in case.schedule) + 1 - resident
    # with as many slots as blocks some are found where they were, or not, by the parity of their
    # turn
    if streamed > ring + 1:
        wider = Case(case.schedule, (resident, ring + 1, *rest), case.speeds, case.compute_s)
        assert run_model(wider).seconds <= seconds + 1e-9


def test_forty_blocks_of_a_whole_run_take_less_than_a_second() -> None:
    schedule = [
        (name, index) for name in ("high", "low") for _ in range(20 * 2) for index in range(40)
    ]
    began = time.perf_counter()
    timeline = simulate_choice(
        schedule,
        PlanChoice(8192, 2, 5, 20, False, 10),
        NBYTES,
        3.0,
        speeds(1, 0.5, 0.7),
        2,
        [80] * 40,
    )
    assert time.perf_counter() - began < 1
    assert len(timeline.visits) == 3200


# The real streamer on a simulated clock


class VirtualClock:
    """Time that stands still while any thread works, and jumps to the next wake-up once all of them
    sleep or wait.

    Threads wait in `threading.Condition`s, which `counted` makes the clock aware of.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()
        self._running = 0
        self._sleepers: list[tuple[float, int, threading.Lock]] = []
        self._order = 0

    def started(self) -> None:
        with self._lock:
            self._running += 1

    def stopped(self) -> None:
        with self._lock:
            self._running -= 1
            self._jump()

    def sleep_until(self, moment: float) -> None:
        awake = threading.Lock()  # an Event would hold one of the conditions that are counted
        awake.acquire()
        with self._lock:
            if moment <= self.now:
                return
            self._order += 1
            heapq.heappush(self._sleepers, (moment, self._order, awake))
            self._running -= 1
            self._jump()
        assert awake.acquire(timeout=LOST_S), "the simulated clock stands still"

    def sleep(self, seconds: float) -> None:
        self.sleep_until(self.now + seconds)

    def _jump(self) -> None:
        if self._running == 0 and self._sleepers:
            self.now, _, awake = heapq.heappop(self._sleepers)
            self._running += 1
            awake.release()


def counted(clock: VirtualClock) -> type[threading.Condition]:
    """Conditions whose waiters the clock knows to be waiting, and to be running again from the
    moment they are notified.
    """

    class Counted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            self._waiting = getattr(self, "_waiting", 0) + 1
            clock.stopped()
            assert super().wait(LOST_S), "nobody notifies this thread"
            return True

        def notify_all(self) -> None:
            for _ in range(getattr(self, "_waiting", 0)):
                clock.started()
            self._waiting = 0
            super().notify_all()

    return Counted


class Recorder:
    """(seconds, event, visit) of everything that happens, as the streamer does it."""

    def __init__(self, clock: VirtualClock, case: Case) -> None:
        self.clock, self.case = clock, case
        self.events: list[tuple[float, str, int]] = []
        visits = case.visits
        stages = [
            number
            for number, visit in enumerate(visits)
            if visit.stage is not None and visit.host is not None
        ]
        copies = [
            number
            for number, visit in enumerate(visits)
            if visit.load and (visit.host, visit.stage) != (None, None)
        ]
        reads = [number for number, visit in enumerate(visits) if visit.read]
        self._next = {"read": iter(reads), "stage": iter(stages), "copy": iter(copies)}

    def note(self, event: str, number: int | None = None) -> int:
        number = next(self._next[event]) if number is None else number
        self.events.append((self.clock.now, event, number))
        return number


class TimedFile(BlockFile):
    """A disk of the case's speed, on the simulated clock."""

    def __init__(self, recorder: Recorder, blocks: int) -> None:
        self.path, self.ranges, self._recorder = (
            Path("simulated"),
            [(index * NBYTES, NBYTES) for index in range(blocks)],
            recorder,
        )

    def read_into(self, block: int, buffer: torch.Tensor) -> torch.Tensor:
        self._recorder.note("read")
        self._recorder.clock.sleep(NBYTES / self._recorder.case.speeds.disk_bytes_s)
        return buffer[:NBYTES]

    def stop(self) -> None:
        return None


class TimedDevice:
    """A device with a stream for copies and one for computing: events are the moments at which they
    will have happened.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._clock, self._speeds = recorder, recorder.clock, recorder.case.speeds
        self.staged = self._speeds.staged
        self.link_free = self.compute_free = self.weights = 0.0

    def pin(self, buffer: torch.Tensor) -> bool:
        return True

    def unpin(self, buffer: torch.Tensor) -> None:
        return None

    def begin(self) -> None:
        return None

    def stage(self, source: torch.Tensor, staging: torch.Tensor) -> None:
        self._recorder.note("stage")
        self._clock.sleep(NBYTES / self._speeds.host_copy_bytes_s)

    def copy(self, host: torch.Tensor, slot: torch.Tensor, after: object | None) -> float | None:
        self._recorder.note("copy")
        if not self.staged:
            self._clock.sleep(NBYTES / self._speeds.host_copy_bytes_s)
            return None
        free = after if isinstance(after, float) else 0.0
        self.link_free = (
            max(self._clock.now, self.link_free, free) + NBYTES / self._speeds.link_bytes_s
        )
        return self.link_free

    def mark(self) -> float | None:
        return self.compute_free if self.staged else None

    def wait(self, event: object | None) -> None:
        if isinstance(event, float):
            self.weights = event

    def settle(self, event: object | None) -> None:
        if isinstance(event, float):
            self._clock.sleep_until(event)

    def compute(self, number: int, seconds: float) -> None:
        """Issues a visit's kernels: a device works them off by itself, a host works here."""
        start = max(self._clock.now, self.compute_free, self.weights)
        self._recorder.events.append((start, "compute", number))
        self.compute_free = start + seconds
        if not self.staged:
            self._clock.sleep(seconds)


@contextmanager
def on_the_clock(monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> Iterator[None]:
    """Conditions and threads made inside are the clock's."""

    class Known(threading.Thread):
        def start(self) -> None:
            clock.started()
            super().start()

        def run(self) -> None:
            try:
                super().run()
            finally:
                clock.stopped()

        def join(self, timeout: float | None = None) -> None:
            clock.stopped()
            super().join(timeout)
            clock.started()

    with monkeypatch.context() as patched:
        patched.setattr("lowvram.streaming.streamer.threading.Condition", counted(clock))
        patched.setattr("lowvram.streaming.streamer.threading.Thread", Known)
        yield


def real_events(
    case: Case, monkeypatch: pytest.MonkeyPatch, steps: frozenset[int] = frozenset()
) -> list[tuple[float, str, int]]:
    """The streamer, its threads and all, on simulated disk, host memory, link and kernels."""
    clock, ledger = VirtualClock(), Ledger("test", 10**6)
    recorder = Recorder(clock, case)
    device = TimedDevice(recorder)
    resident, ring, host, _, staging = case.choice
    slots = Slots("slot", resident + ring, NBYTES, ledger, CPU)
    buffers = (
        Slots("cached", host, NBYTES, ledger, CPU),
        Slots("staging", staging, NBYTES, ledger, CPU),
    )
    blocks = 1 + max(index for _, index in case.schedule)
    files = {
        name: StreamedComponent(TimedFile(recorder, blocks), TENSORS) for name in ("high", "low")
    }
    clock.started()
    with on_the_clock(monkeypatch, clock):
        streamer = Streamer(files, case.visits, slots, *buffers, device)
        with streamer:
            for number, (name, index) in enumerate(case.schedule):
                if number in steps:
                    device.settle(device.compute_free)
                with streamer.block(name, index):
                    device.compute(number, case.compute_s)
                recorder.note("release", number)
            clock.sleep_until(device.compute_free)
    return sorted(recorder.events)


def predicted_events(
    case: Case, steps: frozenset[int] = frozenset()
) -> list[tuple[float, str, int]]:
    events: list[tuple[float, str, int]] = []
    for number, (visit, times) in enumerate(
        zip(case.visits, run_model(case, steps).visits, strict=True)
    ):
        if visit.read:
            events.append((times.read_start_s, "read", number))
        if visit.stage is not None and visit.host is not None:
            events.append((times.stage_start_s, "stage", number))
        if visit.load and (visit.host, visit.stage) != (None, None):
            events.append((times.issued_s, "copy", number))
        events += [
            (times.compute_start_s, "compute", number),
            (times.released_s, "release", number),
        ]
    return sorted(events)


NAMED = {
    "from disk, two slots": ((0, 2, 0, 0, 2), (1, 1, 2), 4.0),
    "from disk, bound by it": ((0, 2, 0, 0, 2), (8, 1, 2), 4.0),
    "bound by the link, four slots": ((0, 4, 0, 0, 2), (1, 1, 8), 2.0),
    "one slot": ((0, 1, 0, 0, 1), (1, 1, 2), 4.0),
    "residents and a pinned prefix": ((1, 2, 3, 3, 2), (2, 1, 2), 1.0),
    "pageable": ((0, 2, 5, 0, 2), (1, 4, 2), 3.0),
    "all three tiers": ((1, 3, 3, 1, 2), (4, 0.5, 1), 2.0),
    "everything resident": ((5, 0, 0, 0, 2), (1, 1, 1), 2.0),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_real_streamer_keeps_the_predicted_times(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read, staging, issue of a copy, computation and release happens at the very moment that
    the model gives it.
    """
    choice, seconds, compute_s = NAMED[name]
    case = Case(two_experts(5, 4, 2), choice, speeds(*seconds), compute_s)
    steps = frozenset((5, 10, 15))
    assert real_events(case, monkeypatch, steps) == predicted_events(case, steps)


@pytest.mark.parametrize("seed", range(40))
def test_the_real_streamer_keeps_the_predicted_times_of_random_choices(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(seed)
    assert real_events(case, monkeypatch) == predicted_events(case)


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_the_real_streamer_on_a_host_keeps_the_predicted_times(
    ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(two_experts(5, 3, 1), (1, ring, 0, 0, 0), speeds(2, 1, 1, staged=False), 3.0)
    assert real_events(case, monkeypatch) == predicted_events(case)


def test_a_wrong_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a model of a slower disk, or of one slot more, gives other times."""
    case = Case(two_experts(5, 3, 1), (0, 2, 0, 0, 2), speeds(4, 1, 2), 3.0)
    events = real_events(case, monkeypatch)
    wrong: list[Callable[[], Case]] = [
        lambda: Case(case.schedule, case.choice, speeds(5, 1, 2), 3.0),
        lambda: Case(case.schedule, (0, 1, 0, 0, 2), case.speeds, 3.0),
        lambda: Case(case.schedule, (0, 2, 0, 0, 1), case.speeds, 3.0),
    ]
    assert events == predicted_events(case)
    assert all(events != predicted_events(other()) for other in wrong)
