"""A device that is host memory, reached as a GPU is: through page-locked staging buffers, with a
driver that can refuse to lock.
"""

from __future__ import annotations

from functools import partial

import torch

from lowvram.pipeline import Pipeline
from lowvram.planner.phases import Host
from lowvram.store.reader import Store
from lowvram.streaming.transport import HostTransport, Transport
from tests.helpers.runs import CPU

PROCESS_BYTES = 10**9


class StagedTransport(HostTransport):
    """Counts what passes each hop. `locks`: how many buffers the driver page-locks before it
    refuses; None: all.
    """

    staged = True

    def __init__(self, locks: int | None = None) -> None:
        self._locks = locks
        self.locked: dict[int, int] = {}  # address -> bytes
        self.staged_blocks = self.pinned_copies = self.pageable_copies = 0

    def pin(self, buffer: torch.Tensor) -> bool:
        if self._locks is not None and len(self.locked) >= self._locks:
            return False
        self.locked[buffer.data_ptr()] = buffer.numel()
        return True

    def unpin(self, buffer: torch.Tensor) -> None:
        del self.locked[buffer.data_ptr()]

    def stage(self, source: torch.Tensor, staging: torch.Tensor) -> None:
        self.staged_blocks += 1
        super().stage(source, staging)

    def copy(self, host: torch.Tensor, slot: torch.Tensor, after: object | None) -> None:
        locked = any(
            start <= host.data_ptr() < start + nbytes for start, nbytes in self.locked.items()
        )
        self.pinned_copies += locked
        self.pageable_copies += not locked
        super().copy(host, slot, after)


class StagedPipeline(Pipeline):
    """A pipeline whose device is reached through `transports`, one per phase that streams, in
    order; the last one stays.
    """

    def __init__(
        self,
        store: Store,
        transport: type[StagedTransport] = StagedTransport,
        locks: int | None = None,
    ) -> None:
        super().__init__(store, CPU, 4 * 2**30, 8 * 2**30, PROCESS_BYTES)
        self.host = Host(staged=True, context_bytes=0, process_bytes=PROCESS_BYTES)
        self._make = partial(transport, locks)
        self.transport = self._make()

    def _transport(self) -> Transport:
        self.transport = self._make()
        return self.transport
