"""Walks the schedule of blocks one step ahead of the computation, through steps and the expert switch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from lowvram.errors import InternalLimitError
from lowvram.streaming.block import BlockTensors, BlockView
from lowvram.streaming.ring import Slots
from lowvram.streaming.source import BlockFile
from lowvram.streaming.transport import Transport
from lowvram.streaming.visits import BlockId, Visit


@dataclass(frozen=True)
class StreamedComponent:
    """One component's blocks: where they lie and what they hold."""

    file: BlockFile
    tensors: BlockTensors


class Streamer:
    """A worker thread brings the block of every visit into its slot, as far ahead as the slots allow.

    `with streamer.block(component, index) as view:` gives the next block of the schedule; asking for another one is an error.
    A failure of the worker is raised in the thread that asks for the block. Use as a context manager: leaving it stops the worker.
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
        self._components = components
        self._visits = visits
        self._slots, self._host, self._staging = slots, host, staging
        self._transport = transport
        self._ready: queue.Queue[tuple[int, object | None] | BaseException] = queue.Queue()
        self._released: dict[int, object | None] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._staged_events: list[object | None] = [None] * len(staging)
        self._host_events: dict[int, object | None] = {}
        self._loads = 0
        self._next = 0
        self.read_bytes = 0
        self._worker = threading.Thread(target=self._run, name="lowvram-streamer", daemon=True)

    def __enter__(self) -> Streamer:
        self._worker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._worker.join()

    @contextmanager
    def block(self, component: str, index: int) -> Iterator[BlockView]:
        """The next visit's block, ready on the computing stream; its slot is free again when the context ends."""
        number = self._next
        if number >= len(self._visits) or self._visits[number].block != (component, index):
            expected = self._visits[number].block if number < len(self._visits) else None
            raise InternalLimitError(f"block {(component, index)} asked for, but the schedule's visit {number} is {expected}")
        arrived = self._ready.get()
        if isinstance(arrived, BaseException):
            raise arrived
        self._transport.wait(arrived[1])
        yield BlockView(self._slots[self._visits[number].slot], self._components[component].tensors)
        self._next += 1
        with self._changed:
            self._released[number] = self._transport.mark()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for number, visit in enumerate(self._visits):
                event = self._load(visit) if visit.load else None
                if self._stopping:
                    return
                self._ready.put((number, event))
        except BaseException as error:  # handed to the computing thread, which raises it
            self._ready.put(error)

    def _load(self, visit: Visit) -> object | None:
        with self._changed:
            while visit.after >= 0 and visit.after not in self._released and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            after = self._released.get(visit.after)
        component, index = visit.block
        file = self._components[component].file
        nbytes = file.ranges[index][1]
        slot = self._slots[visit.slot]
        if visit.host is None and not self._transport.staged:
            self._read(file, visit.block, slot)
            return None
        buffer, stage = self._host_buffer(visit)
        if visit.read:
            self._read(file, visit.block, buffer)
        event = self._transport.copy(buffer[:nbytes], slot, after)
        if stage is not None:
            self._staged_events[stage] = event
        elif visit.host is not None:
            self._host_events[visit.host] = event
        return event

    def _host_buffer(self, visit: Visit) -> tuple[Tensor, int | None]:
        """The block's own RAM buffer, or the next staging buffer once its last copy is over."""
        if visit.host is not None:
            if visit.read:  # the buffer's former block may still be on its way to the device
                self._transport.settle(self._host_events.get(visit.host))
            return self._host[visit.host], None
        stage = self._loads % len(self._staging)
        self._loads += 1
        self._transport.settle(self._staged_events[stage])
        return self._staging[stage], stage

    def _read(self, file: BlockFile, block: BlockId, buffer: Tensor) -> None:
        file.read_into(block[1], buffer)
        self.read_bytes += file.ranges[block[1]][1]
