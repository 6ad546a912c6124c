"""The order in which blocks are visited and the buffers each one passes: pure arithmetic, so that it can be checked by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

BlockId = tuple[str, int]
NEVER = -1


@dataclass(frozen=True)
class Visit:
    """One use of one block. `slot`: where on the device; `load`: whether bytes must be brought there first;
    `after`: the earlier visit that must be over before this slot may be overwritten (-1: none).

    `host`: the RAM buffer that keeps the block (None: none does); `read`: whether the disk must be read; `host_after`: the earlier
    visit that was the last to load what the RAM buffer held before. `stage`: the staging buffer that the load passes (None: it goes
    straight from the RAM buffer, or from the disk into the slot); `stage_after`: the earlier visit whose copy must have left it.
    """

    block: BlockId
    slot: int
    load: bool
    after: int
    host: int | None
    read: bool
    stage: int | None = None
    stage_after: int = NEVER
    host_after: int = NEVER


def assign_slots(
    schedule: Iterable[BlockId],
    resident_blocks: int,
    ring_slots: int,
    host_blocks: int,
    staging_buffers: int = 0,
    pinned: Collection[int] = (),
) -> list[Visit]:
    """Slots 0 .. resident-1 keep the first blocks of the component at work; the rest go round the ring after them.

    Host buffers keep the `host_blocks` next ones: a fixed prefix, because a cyclic scan defeats any least-recently-used cache.
    When the component changes (the expert switch), its blocks take the same slots over as they are first visited.
    Loads take turns at the staging buffers, but for those whose host buffer is one of `pinned`; without staging none does.
    """
    in_slot: dict[int, BlockId] = {}
    in_host: dict[int, BlockId] = {}
    last_use: dict[int, int] = {}
    last_from_host: dict[int, int] = {}
    last_staged: dict[int, int] = {}
    visits: list[Visit] = []
    turn = staged = 0
    for number, block in enumerate(schedule):
        index = block[1]
        if index < resident_blocks:
            slot = index
        else:
            slot = resident_blocks + turn % ring_slots
            turn += 1
        load = in_slot.get(slot) != block
        host = index - resident_blocks if resident_blocks <= index < resident_blocks + host_blocks else None
        read, host_after, stage, stage_after = load, NEVER, None, NEVER
        if load and host is not None:
            read = in_host.get(host) != block
            host_after = last_from_host.get(host, NEVER)
            in_host[host], last_from_host[host] = block, number
        if load and staging_buffers and host not in pinned:
            stage = staged % staging_buffers
            stage_after = last_staged.get(stage, NEVER)
            last_staged[stage] = number
            staged += 1
        visits.append(Visit(block, slot, load, last_use.get(slot, NEVER), host, read, stage, stage_after, host_after))
        in_slot[slot] = block
        last_use[slot] = number
    return visits
