"""The CUDA transport without a GPU: a driver that refuses to lock pages, and a device whose streams
run in any order that is allowed.

Refusals are heard and leave no error behind. Of copies and computations each waits for what it
needs and for nothing else: the real streamer walks random schedules over the real transport, bytes
move when the device reaches a copy, and every block is looked at when the device computes with it.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

from lowvram.memory.arena import Ledger
from lowvram.streaming import transport as transport_module
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import assign_slots
from lowvram.streaming.slots import Slots
from lowvram.streaming.streamer import StreamedComponent, Streamer
from lowvram.streaming.transport import CudaTransport, HostTransport, make_transport

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 1)


class Driver:
    """Stands for CUDA's runtime: codes for the next calls, the error that a launch's check would
    find, the device that is current.
    """

    def __init__(self) -> None:
        self.register = self.unregister = self.last_error = self.current = 0
        self.calls: list[tuple[str, int, int]] = []  # (call, address, the device current then)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return self._answer("register", address, self.register)

    def cudaHostUnregister(self, address: int) -> int:
        return self._answer("unregister", address, self.unregister)

    def _answer(self, call: str, address: int, code: int) -> int:
        self.calls.append((call, address, self.current))
        self.last_error = code or self.last_error
        return code

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def launch(self, size: int, *, device: torch.device) -> None:
        """A kernel, whose check takes the last error off and raises it."""
        assert device == DEVICE
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error: {error}")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    stream: Callable[[Any], object] = lambda device: object()  # noqa: E731
    for name, value in {
        "cudart": lambda: driver,
        "device": driver.device,
        "Stream": stream,
        "current_stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", driver.launch)
    return driver


BUFFER = torch.empty(4096, dtype=torch.uint8)


def test_pages_are_locked_and_unlocked_on_the_device_of_the_run(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    transport = make_transport(DEVICE)
    assert isinstance(transport, CudaTransport)
    assert transport.pin(BUFFER)
    transport.unpin(BUFFER)
    assert driver.calls == [
        ("register", BUFFER.data_ptr(), 1),
        ("unregister", BUFFER.data_ptr(), 1),
    ]
    assert driver.current == 0
    assert not caplog.records


def test_a_refusal_to_lock_is_heard_and_leaves_no_error(driver: Driver) -> None:
    driver.register = 1
    assert not CudaTransport(DEVICE).pin(BUFFER)
    assert driver.last_error == 0


def test_a_refusal_to_unlock_is_said_and_leaves_no_error(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    transport = CudaTransport(DEVICE)
    assert transport.pin(BUFFER)
    driver.unregister = 713
    with caplog.at_level(logging.WARNING):
        transport.unpin(BUFFER)
    assert driver.last_error == 0, "the next kernel would raise it"
    assert "4096 bytes" in caplog.text
    assert "713" in caplog.text


def test_a_host_needs_no_locked_pages() -> None:
    transport = make_transport(torch.device("cpu"))
    assert isinstance(transport, HostTransport)
    assert transport.pin(BUFFER)
    transport.unpin(BUFFER)


class FakeStream:
    """Operations in the order in which they were given; `eager`: how likely the device goes on with
    them unasked.
    """

    def __init__(self, gpu: Gpu, eager: float) -> None:
        self._gpu, self.eager = gpu, eager
        self.queue: deque[tuple[Point | None, Callable[[], object]]] = deque()
        self.issued = self.finished = 0

    def put(self, *steps: Callable[[], object], until: Point | None = None) -> None:
        with self._gpu.lock:
            self.queue += [(until, step) for step in steps]
            self.issued += len(steps)
            self._gpu.drift()

    def wait_event(self, event: FakeEvent) -> None:
        """As CUDA has it: for the event's last record so far, and for nothing where there was
        none.
        """
        if event.point is not None:
            self.put(lambda: None, until=event.point)

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        raise AssertionError("the host waits for a whole stream")


class Point:
    """Behind everything that a stream has been given so far."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream, self._count = stream, stream.issued

    @property
    def over(self) -> bool:
        return self.stream.finished >= self._count


class FakeEvent:
    """torch.cuda.Event"""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.blocking = blocking
        self.point: Point | None = None

    @property
    def over(self) -> bool:
        return self.point is None or self.point.over

    def record(self, stream: FakeStream) -> None:
        self.point = Point(stream)

    def synchronize(self) -> None:
        if self.point is not None:
            self.point.stream._gpu.reach(self.point)


class Gpu:
    """Two streams that share nothing but what they are told to wait for. Where both could go on,
    either does.
    """

    def __init__(self, rng: random.Random, computing: float = 0.0, copying: float = 0.0) -> None:
        self.lock = threading.RLock()
        self.held_up: list[str] = []  # threads that waited for the device
        self._rng, self._copying, self._here = rng, copying, threading.local()
        self.computing = FakeStream(self, computing)
        self.streams = [self.computing]

    def new_stream(self, device: torch.device) -> FakeStream:
        assert device == DEVICE
        self.streams.append(FakeStream(self, self._copying))
        return self.streams[-1]

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return getattr(self._here, "stream", self.computing)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        yield
        self._here.stream = before

    def synchronize(self, device: object = None) -> None:
        raise AssertionError("the host waits for the whole device")

    def launch(self, *steps: Callable[[], object]) -> None:
        self.computing.put(*steps)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """In two halves, between which the other stream may go on."""
        middle = len(source) // 2
        halves = [(target[:middle], source[:middle]), (target[middle:], source[middle:])]
        self.current_stream().put(*(lambda to=to, come=come: to.copy_(come) for to, come in halves))

    def step(self, stream: FakeStream) -> bool:
        """The stream's next operation; False where there is none, or it must wait."""
        with self.lock:
            if not stream.queue or not (stream.queue[0][0] is None or stream.queue[0][0].over):
                return False
            stream.queue.popleft()[1]()
            stream.finished += 1
            return True

    def run(self, stream: FakeStream) -> None:
        while self.step(stream):
            pass

    def drift(self) -> None:
        """Every stream goes on for as long as it likes, in turns."""
        while sum(
            self._rng.random() < stream.eager and self.step(stream) for stream in self.streams
        ):
            pass

    def reach(self, point: Point) -> None:
        """The host waits: what lies before `point` happens, and what that waits for; nothing else
        must.
        """
        self.held_up.append(threading.current_thread().name)
        while True:
            with self.lock:
                if point.over:
                    return
                needed = point
                while not self.step(needed.stream):
                    assert needed.stream.queue[0][0] is not None
                    needed = needed.stream.queue[0][0]

    def finish(self) -> None:
        while sum(self.step(stream) for stream in self.streams):
            pass


class DeviceTensor(torch.Tensor):
    """Bytes on the fake device: copies into them happen when the stream that they were given to
    reaches them.
    """

    gpu: ClassVar[Gpu]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "copy_":
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        assert (kwargs or {}).get("non_blocking"), "a blocking copy waits for its whole stream"
        cls.gpu.copy(plain(args[0]), plain(args[1]))
        return args[0]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


class DeviceLedger(Ledger):
    """Its memory lies on the fake device."""

    def allocate(self, label: str, nbytes: int, device: torch.device) -> torch.Tensor:
        return super().allocate(label, nbytes, CPU).as_subclass(DeviceTensor)


@contextlib.contextmanager
def installed(gpu: Gpu) -> Iterator[Gpu]:
    """torch.cuda means `gpu`."""
    names = {
        "Stream": gpu.new_stream,
        "Event": FakeEvent,
        "current_stream": gpu.current_stream,
        "stream": gpu.stream,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            names | {"synchronize": gpu.synchronize, "device": contextlib.nullcontext}
        ).items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(DeviceTensor, "gpu", gpu, raising=False)
        yield gpu


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    """Does nothing unasked."""
    with installed(Gpu(random.Random(0))) as gpu:
        yield gpu


HOST_BYTES = torch.arange(1, 9, dtype=torch.uint8)


def empty_slot() -> torch.Tensor:
    return torch.zeros(12, dtype=torch.uint8).as_subclass(DeviceTensor)


def arrived(slot: torch.Tensor) -> bool:
    assert plain(slot)[8:].tolist() == [0] * 4
    return plain(slot)[:8].tolist() == HOST_BYTES.tolist()


def copy_to(slot: torch.Tensor, transport: CudaTransport, after: object = None) -> FakeEvent:
    """Copies `HOST_BYTES`; the event is the fake device's."""
    return cast(FakeEvent, transport.copy(HOST_BYTES, slot, after))


def test_a_stream_begins_behind_what_was_given_to_the_device_and_waits_for_nothing_later(
    gpu: Gpu,
) -> None:
    transport, slot, done = CudaTransport(DEVICE), empty_slot(), list[str]()
    (copying,) = gpu.streams[1:]
    gpu.launch(lambda: done.append("earlier"))
    transport.begin()
    gpu.launch(lambda: done.append("later"))
    transport.copy(HOST_BYTES, slot, None)
    gpu.run(copying)
    assert plain(slot).tolist() == [0] * 12
    assert gpu.step(gpu.computing)
    gpu.run(copying)
    assert arrived(slot)
    assert done == ["earlier"]
    assert gpu.held_up == []


def test_a_copy_waits_for_the_slots_last_use_alone_and_its_event_comes_behind_it(gpu: Gpu) -> None:
    transport, slot, done = CudaTransport(DEVICE), empty_slot(), list[str]()
    (copying,) = gpu.streams[1:]
    gpu.launch(lambda: done.append("the slot's last use"))
    after = transport.mark()
    gpu.launch(lambda: done.append("later"))
    event = copy_to(slot, transport, after)
    gpu.run(copying)
    assert plain(slot).tolist() == [0] * 12
    assert gpu.step(gpu.computing)
    while not event.over:
        assert not arrived(slot)
        assert gpu.step(copying)
    assert arrived(slot)
    assert done == ["the slot's last use"]
    assert gpu.held_up == []
    assert event.blocking, "a thread that settles on it would spin"


def test_computing_waits_for_its_own_copy_and_holds_up_neither_host_nor_copies(gpu: Gpu) -> None:
    transport, slots, done = CudaTransport(DEVICE), (empty_slot(), empty_slot()), list[str]()
    (copying,) = gpu.streams[1:]
    mine, _ = (copy_to(slot, transport) for slot in slots)
    transport.wait(mine)
    gpu.launch(lambda: done.append("computed"))
    gpu.run(gpu.computing)
    assert done == []
    while not mine.over:
        assert gpu.step(copying)
    gpu.run(gpu.computing)
    assert done == ["computed"]
    assert [arrived(slot) for slot in slots] == [True, False]
    transport.wait(transport.copy(HOST_BYTES, slots[0], None))
    third = empty_slot()
    transport.copy(HOST_BYTES, third, None)
    gpu.run(copying)
    assert arrived(third), "a copy waited for the computing stream"
    assert gpu.held_up == []


def test_settling_waits_for_one_event_and_leaves_everything_else_under_way(gpu: Gpu) -> None:
    transport, slots, done = CudaTransport(DEVICE), (empty_slot(), empty_slot()), list[str]()
    gpu.launch(lambda: done.append("computed"))
    first, second = (copy_to(slot, transport) for slot in slots)
    transport.settle(first)
    assert [arrived(slot) for slot in slots] == [True, False]
    assert done == []
    assert not second.over
    assert gpu.held_up == ["MainThread"]


def test_there_is_nothing_to_wait_for_where_there_was_no_event(gpu: Gpu) -> None:
    transport = CudaTransport(DEVICE)
    transport.wait(None)
    transport.settle(None)
    assert gpu.held_up == []
    assert not any(stream.queue for stream in gpu.streams)


BLOCKS, NBYTES = 5, 64
FIRST = {"high": 1, "low": 101}
# what earlier work leaves in the slots, and others in buffers that were handed back
LEFT_BEHIND = 255


class FilledFile(BlockFile):
    """Every byte of a block tells which one it is; they come in two halves."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.path, self.ranges = Path(name), [(index * NBYTES, NBYTES) for index in range(BLOCKS)]
        self._rng, self._first = rng, FIRST[name]

    def read_into(self, block: int, buffer: torch.Tensor) -> torch.Tensor:
        buffer[: NBYTES // 2] = self._first + block
        if self._rng.random() < 0.2:
            time.sleep(self._rng.random() * 1e-4)
        return buffer[:NBYTES].fill_(self._first + block)

    def stop(self) -> None:
        return None


def faults_of_a_walk(seed: int, transport_class: Callable[[torch.device], Any]) -> list[str]:
    """The real streamer with a random plan, over a device that works on each stream never, now and
    then or at once until it must.
    """
    rng = random.Random(seed)
    steps, switch = rng.randint(1, 4), rng.randint(0, 4)
    schedule = [
        ("high" if step < switch else "low", index)
        for step in range(steps)
        for index in range(BLOCKS)
    ]
    resident = rng.randint(0, BLOCKS)
    ring, cached = rng.randint(1, 3) if resident < BLOCKS else 0, rng.randint(0, BLOCKS - resident)
    staged, pinned = rng.randint(1, 3), set(range(rng.randint(0, cached)))
    faults: list[str] = []
    with installed(Gpu(rng, rng.choice((0.0, 0.5, 1.0)), rng.choice((0.0, 0.5, 1.0)))) as gpu:
        ledger = Ledger("RAM", 10**6)
        slots = Slots("slot", resident + ring, NBYTES, DeviceLedger("VRAM", 10**6), CPU)
        host, staging = (
            Slots("cached", cached, NBYTES, ledger, CPU),
            Slots("staging", staged, NBYTES, ledger, CPU),
        )
        # it was another's, whose last kernels are still to run
        for slot in [plain(slots[number]) for number in range(len(slots))]:
            gpu.launch(partial(slot.fill_, LEFT_BEHIND))
        files = {
            name: StreamedComponent(FilledFile(name, rng), {"weight": (torch.uint8, (NBYTES,), 0)})
            for name in FIRST
        }
        visits = assign_slots(schedule, resident, ring, cached, staged, pinned)

        def compute(number: int, weight: torch.Tensor, expected: int) -> None:
            if found := set(weight.tolist()) - {expected}:
                faults.append(f"visit {number} computed with {sorted(found)} instead of {expected}")

        with Streamer(files, visits, slots, host, staging, transport_class(DEVICE)) as streamer:
            for number, (name, index) in enumerate(schedule):
                with streamer.block(name, index) as block:
                    work = (number, plain(block["weight"]), FIRST[name] + index)
                    # at its start and at its end
                    gpu.launch(*2 * [lambda work=work: compute(*work)])
            if threading.current_thread().name in gpu.held_up:
                faults.append("the thread that computes waited for the device")
        for buffers in (host, staging):
            for number in range(len(buffers)):
                buffers[number].fill_(LEFT_BEHIND)
        gpu.finish()
        if any(stream.queue for stream in gpu.streams):
            faults.append("the device waits for something that never comes")
    return faults


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_every_block_is_there_when_it_is_computed_with_whatever_the_device_does_first(
    first: int,
) -> None:
    for seed in range(first, first + 100):
        assert faults_of_a_walk(seed, CudaTransport) == [], seed


COPY = "            slot[: host.numel()].copy_(host, non_blocking=True)\n"
EVENT = (
    "            event = torch.cuda.Event(blocking=True)  # `settle` sleeps instead of spinning\n"
)
RECORD = "            event.record(self._stream)\n"
MISTAKES = {
    "begin waits for nothing": ("self._stream.wait_stream(self._computing)", "pass"),
    "begin waits the other way round": (
        "self._stream.wait_stream(self._computing)",
        "self._computing.wait_stream(self._stream)",
    ),
    "copies on the computing stream": (
        "torch.cuda.stream(self._stream)",
        "contextlib.nullcontext()",
    ),
    "a copy does not wait for its slot": ("self._stream.wait_event(after)", "pass"),
    "computing waits in the place of the copy": (
        "self._stream.wait_event(after)",
        "self._computing.wait_event(after)",
    ),
    "the host waits in the place of the copy": (
        "self._stream.wait_event(after)",
        "self._stream.synchronize()",
    ),
    "a copy blocks the host": (", non_blocking=True", ""),
    "a copy's event is not recorded": (RECORD, ""),
    "a copy's event is recorded on the computing stream": (
        RECORD,
        RECORD.replace("_stream", "_computing"),
    ),
    "a copy's event is recorded before it": (COPY + EVENT + RECORD, EVENT + RECORD + COPY),
    "a mark is not recorded": ("event.record(self._computing)", "pass"),
    "a mark is recorded on the copies' stream": (
        "event.record(self._computing)",
        "event.record(self._stream)",
    ),
    "computing does not wait for the copy": ("self._computing.wait_event(event)", "pass"),
    "copies wait in the place of computing": (
        "self._computing.wait_event(event)",
        "self._stream.wait_event(event)",
    ),
    "the host waits in the place of computing": (
        "self._computing.wait_event(event)",
        "event.synchronize()",
    ),
    "a buffer is not settled on": ("event.synchronize()", "pass"),
    "settling waits for the whole stream": ("event.synchronize()", "self._stream.synchronize()"),
    "settling waits for the whole device": (
        "event.synchronize()",
        "torch.cuda.synchronize(self._device)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_transport_that_forgets_to_wait_or_waits_for_too_much_is_caught(mistake: str) -> None:
    """What makes the test above able to fail, wait by wait and record by record."""
    source = inspect.getsource(transport_module)
    right, wrong = MISTAKES[mistake]
    assert source.count(right) == 1, "transport.py reads differently now: plant the mistake there"
    module: dict[str, Any] = {"__name__": "mistaken"}
    exec(compile(source.replace(right, wrong), "mistaken transport.py", "exec"), module)
    assert any(is_caught(seed, module["CudaTransport"]) for seed in range(100))


def is_caught(seed: int, transport_class: Callable[[torch.device], Any]) -> bool:
    try:
        return bool(faults_of_a_walk(seed, transport_class))
    except AssertionError:
        return True
