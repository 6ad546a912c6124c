"""The order in which blocks are visited and the slot each one lands in: pure arithmetic, so that it can be checked by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BlockId = tuple[str, int]


@dataclass(frozen=True)
class Visit:
    """One use of one block. `slot`: where on the device; `load`: whether bytes must be brought there first;
    `after`: the earlier visit that must be over before this slot may be overwritten (-1: none);
    `host`: the RAM buffer that keeps the block (None: it passes through staging); `read`: whether the disk must be read.
    """

    block: BlockId
    slot: int
    load: bool
    after: int
    host: int | None
    read: bool


def assign_slots(schedule: Iterable[BlockId], resident_blocks: int, ring_slots: int, host_blocks: int) -> list[Visit]:
    """Slots 0 .. resident-1 keep the first blocks of the component at work; the rest go round the ring after them.

    Host buffers keep the `host_blocks` next ones: a fixed prefix, because a cyclic scan defeats any least-recently-used cache.
    When the component changes (the expert switch), its blocks take the same slots over as they are first visited.
    """
    in_slot: dict[int, BlockId] = {}
    in_host: dict[int, BlockId] = {}
    last_use: dict[int, int] = {}
    visits: list[Visit] = []
    turn = 0
    for number, block in enumerate(schedule):
        index = block[1]
        if index < resident_blocks:
            slot = index
        else:
            slot = resident_blocks + turn % ring_slots
            turn += 1
        load = in_slot.get(slot) != block
        host = index - resident_blocks if resident_blocks <= index < resident_blocks + host_blocks else None
        read = load
        if load and host is not None:
            read = in_host.get(host) != block
            in_host[host] = block
        visits.append(Visit(block, slot, load, last_use.get(slot, -1), host, read))
        in_slot[slot] = block
        last_use[slot] = number
    return visits
