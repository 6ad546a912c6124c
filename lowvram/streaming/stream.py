"""Open the slots, buffers, files and workers of one schedule of blocks, and close them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.memory.arena import Ledger
from lowvram.store.reader import StoreFile
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import BlockId, assign_slots
from lowvram.streaming.slots import Slots
from lowvram.streaming.streamer import StreamedComponent, Streamer
from lowvram.streaming.transport import Transport


class Buffers(NamedTuple):
    """Numbers of buffers of `slot_bytes` each.

    resident, ring: slots on the device; host: blocks cached in RAM, the first `pinned` of them
    page-locked; staging: buffers in RAM, page-locked if the driver allows.
    """

    slot_bytes: int
    resident: int
    ring: int
    host: int
    staging: int
    pinned: int = 0


@contextmanager
def open_stream(
    files: Mapping[str, StoreFile],
    schedule: Sequence[BlockId],
    buffers: Buffers,
    vram: Ledger,
    ram: Ledger,
    device: torch.device,
    transport: Transport,
) -> Iterator[Streamer]:
    """A streamer of `schedule`, with its memory charged to the two ledgers. files: the store's, by
    component.

    Raises `OutOfMemoryError` if the machine has less memory than planned.
    """
    cpu = torch.device("cpu")
    with ExitStack() as stack:

        def slots(label: str, count: int, ledger: Ledger, where: torch.device) -> Slots:
            made = Slots(label, count, buffers.slot_bytes, ledger, where)
            stack.callback(made.close)
            return made

        components = {
            name: streamed(files[name]) for name in sorted({component for component, _ in schedule})
        }
        for component in components.values():
            stack.callback(component.file.close)
        on_device = slots("block slot", buffers.resident + buffers.ring, vram, device)
        stages, cached = (
            slots("staging buffer", buffers.staging, ram, cpu),
            slots("cached block", buffers.host, ram, cpu),
        )
        stages.pin(buffers.staging, transport)
        cached.pin(buffers.pinned, transport)
        visits = assign_slots(
            schedule, buffers.resident, buffers.ring, buffers.host, buffers.staging, cached.pinned
        )
        yield stack.enter_context(
            Streamer(components, visits, on_device, cached, stages, transport)
        )


def streamed(file: StoreFile) -> StreamedComponent:
    """Open one component's file for reading blocks."""
    ranges = [(block.start, block.nbytes) for block in file.blocks]
    tensors = {
        name: (TORCH_DTYPES[dtype], shape, offset)
        for name, (dtype, shape, offset) in file.block_tensors.items()
    }
    return StreamedComponent(
        BlockFile(file.path, ranges, modified_ns=file.modified_ns),
        tensors,
        file.is_checked,
        file.checks,
    )
