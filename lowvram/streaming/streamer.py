"""Bring blocks to the device ahead of the computation, through all steps and the expert switch.
Each hop has its own thread or stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lowvram.errors import InternalLimitError
from lowvram.hardware.cgroups import cpu_count
from lowvram.streaming.block import BlockTensors, BlockView
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import NEVER, BlockId, Visit
from lowvram.streaming.slots import Slots
from lowvram.streaming.transport import Transport

# Hops of a visit: disk -> RAM, comparison with its hashes, RAM -> staging, RAM -> device, and its
# computation.
DISK, CHECK, STAGE, LINK, COMPUTE = "disk", "check", "stage", "link", "compute"
HASH_THREADS = 4
WAIT_S = 0.5  # at a time: Windows hears Ctrl-C only between two waits


@dataclass(frozen=True)
class StreamedComponent:
    """The blocks of one component: their file, and the tensors of a block.

    is_checked: whether a block was compared with its hashes before; checks: the comparisons of a
    block that was read (see `StoreFile`).
    """

    file: BlockFile
    tensors: BlockTensors
    is_checked: Callable[[int], bool] = lambda index: True
    checks: Callable[[int, Tensor], list[Callable[[], None]]] = lambda index, data: []


class Stopped(Exception):
    """Ends a worker's wait after the run is over."""


class Hops:
    """Finished hops: (hop, visit) -> the event of its end, or the failure in its place."""

    def __init__(self) -> None:
        self._over: dict[tuple[str, int], object | None] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def done(self, hop: str, number: int, event: object | None) -> None:
        """Record the end of a hop, or its failure."""
        with self._changed:
            self._over[hop, number] = event
            self._changed.notify_all()

    def wait(self, hop: str, number: int) -> object | None:
        """Wait until the hop was issued and return its event. Raises its failure, or `Stopped`."""
        with self._changed:
            while not (self._stopped or (hop, number) in self._over):
                self._changed.wait(WAIT_S)
            if self._stopped:
                raise Stopped
            event = self._over[hop, number]
        if isinstance(event, BaseException):
            raise event
        return event

    def forget(self, number: int) -> None:
        """Drop the events of a visit that are no longer needed."""
        with self._changed:
            for hop in (DISK, CHECK, STAGE, LINK, COMPUTE):
                self._over.pop((hop, number), None)

    def stop(self) -> None:
        """Wake all waiting workers with `Stopped`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Streamer:
    """Three workers bring the block of every visit into its slot, each as far ahead as its buffers
    allow: disk -> RAM, RAM -> staging (only for blocks in pageable RAM), RAM -> device. A fourth
    compares what is read for the first time with its hashes, while the next block is read. Each
    walks the schedule in order and waits only for earlier visits.

    `with streamer.block(component, index) as view:` gives the next block of the schedule; asking
    for another one is an error. A worker's failure is raised in the thread that asks for the block
    that failed. Use as a context manager: leaving it stops the workers.
    """

    def __init__(
        self,
        components: Mapping[str, StreamedComponent],
        visits: list[Visit],
        slots: Slots,
        host: Slots,
        staging: Slots,
        transport: Transport,
    ) -> None:
        """host, staging: the RAM buffers and staging buffers that `visits` were assigned to."""
        if transport.staged and any(
            visit.load and visit.host is None and visit.stage is None for visit in visits
        ):
            raise InternalLimitError(
                "this device is reached through staging buffers, but the schedule was made "
                "without any"
            )
        self._components = components
        self._visits = visits
        self._slots, self._host, self._staging = slots, host, staging
        self._transport = transport
        self._hops = Hops()
        # Where the bytes of a block begin in a buffer depends on where they lie in the file: what
        # each buffer holds now.
        self._in_slot: dict[int, Tensor] = {}
        self._in_host: dict[int, Tensor] = {}
        self._in_stage: dict[int, Tensor] = {}
        self._checked_visits = self._first_reads()
        self._awaited = {visit.after for visit in visits if visit.load}
        # No visit asks for what happened longer ago than this many visits.
        former = (
            (number, before)
            for number, visit in enumerate(visits)
            for before in (visit.after, visit.stage_after, visit.host_after)
        )
        self._look_back = max(
            (number - before for number, before in former if before != NEVER), default=0
        )
        self._last_copy: object | None = None
        self._next = 0
        self._counting = threading.Lock()
        self.read_bytes = 0
        self._hashers = ThreadPoolExecutor(min(HASH_THREADS, cpu_count()), "lowvram-hash")
        self._workers = [
            threading.Thread(
                target=self._walk, args=(hop, takes, carry), name=f"lowvram-{hop}", daemon=True
            )
            for hop, takes, carry in (
                (DISK, self._reads_ahead, self._from_disk),
                (STAGE, self._copies_on_the_host, self._to_staging),
                (LINK, lambda number: visits[number].load, self._to_device),
                (CHECK, self._checked_visits.__contains__, self._check),
            )
            if any(takes(number) for number in range(len(visits)))
        ]

    def __enter__(self) -> Streamer:
        self._transport.begin()
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hops.stop()
        for component in self._components.values():
            component.file.stop()
        for worker in self._workers:
            worker.join()
        self._hashers.shutdown(cancel_futures=True)
        self._transport.settle(self._last_copy)  # the buffers it reads are handed back next

    @contextmanager
    def block(self, component: str, index: int) -> Iterator[BlockView]:
        """The block of the next visit, ready on the computing stream. Its slot is free again after
        the context.
        """
        number = self._next
        if number >= len(self._visits) or self._visits[number].block != (component, index):
            expected = self._visits[number].block if number < len(self._visits) else None
            raise InternalLimitError(
                f"block {(component, index)} asked for, but the schedule's visit {number} is "
                f"{expected}"
            )
        visit = self._visits[number]
        if visit.load:
            self._transport.wait(self._hops.wait(LINK, number))
        if number in self._checked_visits:
            self._hops.wait(CHECK, number)
        yield BlockView(self._in_slot[visit.slot], self._components[component].tensors)
        self._next += 1
        self._hops.done(
            COMPUTE, number, self._transport.mark() if number in self._awaited else None
        )
        self._hops.forget(number - self._look_back - 1)

    def _walk(
        self, hop: str, takes: Callable[[int], bool], carry: Callable[[int, Visit], object | None]
    ) -> None:
        for number, visit in enumerate(self._visits):
            if not takes(number):
                continue
            try:
                self._hops.done(hop, number, carry(number, visit))
            except Stopped:
                return
            except (
                BaseException
            ) as error:  # handed on, hop by hop, to the thread that asks for this block
                self._hops.done(hop, number, error)
                return

    def _first_reads(self) -> set[int]:
        """Visits that read a block which was not compared with its hashes before."""
        first: dict[BlockId, int] = {}
        for number, visit in enumerate(self._visits):
            if self._reads_ahead(number) or (visit.load and visit.host is visit.stage is None):
                first.setdefault(visit.block, number)
        return {
            number
            for (component, index), number in first.items()
            if not self._components[component].is_checked(index)
        }

    def _reads_ahead(self, number: int) -> bool:
        visit = self._visits[number]
        return visit.read and (visit.host is not None or visit.stage is not None)

    def _copies_on_the_host(self, number: int) -> bool:
        visit = self._visits[number]
        return visit.stage is not None and visit.host is not None

    def _check(self, number: int, visit: Visit) -> None:
        """Compare the block with its hashes, on several threads."""
        self._hops.wait(DISK if self._reads_ahead(number) else LINK, number)
        component, index = visit.block
        if visit.host is not None:
            data = self._in_host[visit.host]
        elif visit.stage is not None:
            data = self._in_stage[visit.stage]
        else:
            data = self._in_slot[visit.slot]
        tasks = self._components[component].checks(index, data)
        for task in [self._hashers.submit(check) for check in tasks]:
            task.result()

    def _from_disk(self, number: int, visit: Visit) -> None:
        """Disk -> the block's RAM buffer if it has one, else its staging buffer."""
        if visit.host is not None:
            self._leave_host(visit.host_after)
            self._in_host[visit.host] = self._read(visit, self._host[visit.host])
        elif visit.stage is not None:
            self._leave(visit.stage_after)
            self._in_stage[visit.stage] = self._read(visit, self._staging[visit.stage])

    def _to_staging(self, number: int, visit: Visit) -> None:
        """Pageable RAM -> staging."""
        if visit.stage is None or visit.host is None:
            raise InternalLimitError(f"visit {number} has no way through staging")
        if visit.read:
            self._hops.wait(DISK, number)
        self._leave(visit.stage_after)
        source = self._in_host[visit.host]
        staging = self._staging[visit.stage][: source.numel()]
        self._transport.stage(source, staging)
        self._in_stage[visit.stage] = staging

    def _to_device(self, number: int, visit: Visit) -> object | None:
        """Staging or RAM -> slot; directly from the disk if the slot is host memory."""
        slot = self._slots[visit.slot]
        if self._copies_on_the_host(number):
            self._hops.wait(STAGE, number)
        elif self._reads_ahead(number):
            self._hops.wait(DISK, number)
        after = self._hops.wait(COMPUTE, visit.after) if visit.after != NEVER else None
        if visit.stage is not None:
            source = self._in_stage[visit.stage]
        elif visit.host is not None:
            source = self._in_host[visit.host]
        else:
            self._in_slot[visit.slot] = self._read(visit, slot)
            return None
        self._in_slot[visit.slot] = slot[: source.numel()]
        self._last_copy = self._transport.copy(source, slot, after)
        return self._last_copy

    def _leave(self, number: int) -> None:
        """Waits until the copy of an earlier visit has left the buffer that it came from."""
        if number != NEVER:
            self._transport.settle(self._hops.wait(LINK, number))
            if number in self._checked_visits:
                self._hops.wait(CHECK, number)

    def _leave_host(self, number: int) -> None:
        """The same for a RAM buffer, which pageable blocks leave through staging."""
        if number != NEVER and self._copies_on_the_host(number):
            self._hops.wait(STAGE, number)
            if number in self._checked_visits:
                self._hops.wait(CHECK, number)
        else:
            self._leave(number)

    def _read(self, visit: Visit, buffer: Tensor) -> Tensor:
        component, index = visit.block
        source = self._components[component]
        view = source.file.read_into(index, buffer)
        if source.file.modified:  # not as it was when its blocks were compared
            for check in source.checks(index, view):
                check()
        with self._counting:
            self.read_bytes += view.numel()
        return view
