"""Assign device slots, RAM buffers and staging buffers to the visits of blocks. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

BlockId = tuple[str, int]
NEVER = -1


@dataclass(frozen=True)
class Visit:
    """One use of one block. Visits are numbered by their place in the schedule; `NEVER` is none.

    slot: device slot of the block; load: whether it must be copied there first; after: the visit
    that must end before the slot may be overwritten.
    host: RAM buffer that keeps the block, or None; read: whether it must be read from disk;
    host_after: the last visit that copied the previous content of the RAM buffer.
    stage: staging buffer of the copy, or None for a copy from the RAM buffer, or a read from disk
    into the slot; stage_after: the visit whose copy out of the staging buffer must be complete.
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


def spread(count: int, total: int) -> list[int]:
    """`count` evenly spaced numbers from 0 .. total - 1, always including the last one."""
    return [
        number for number in range(total) if (number + 1) * count // total > number * count // total
    ]


def tiers(num_blocks: int, resident_blocks: int, host_blocks: int) -> tuple[list[int], list[int]]:
    """Blocks of a component that stay on the device, and blocks that stay in RAM.

    Both sets are fixed, because a least-recently-used cache never hits in a cyclic scan. Both are
    evenly spaced, so that the copies of streamed blocks overlap with the computation of resident
    ones, and disk reads with copies from RAM.
    """
    streamed = spread(num_blocks - resident_blocks, num_blocks)
    from_disk = {
        streamed[place] for place in spread(max(0, len(streamed) - host_blocks), len(streamed))
    }
    not_resident = set(streamed)
    return [block for block in range(num_blocks) if block not in not_resident], [
        block for block in streamed if block not in from_disk
    ]


def _locked_first(kept: list[int], pinned: int) -> list[int]:
    """Order the blocks in RAM: those with page-locked buffers first.

    These are evenly spaced, too, because a block in a pageable buffer needs one more copy.
    """
    locked = {kept[place] for place in spread(min(pinned, len(kept)), len(kept))}
    return sorted(kept, key=lambda block: block not in locked)


def assign_slots(
    schedule: Iterable[BlockId],
    resident_blocks: int,
    ring_slots: int,
    host_blocks: int,
    staging_buffers: int = 0,
    pinned: Collection[int] = (),
) -> list[Visit]:
    """Turn a schedule of blocks into visits with assigned buffers.

    schedule: whole passes through a component's blocks.
    resident_blocks, host_blocks: number of blocks that stay on the device and in RAM, by `tiers`.
    ring_slots: number of slots for streamed blocks, used in turn.
    staging_buffers: number of staging buffers, used in turn by loads without a pinned RAM buffer.
    pinned: indices of the pinned RAM buffers.
    When the component changes (the expert switch), its blocks take over the same slots at their
    first visit.
    """
    in_slot: dict[int, BlockId] = {}
    in_host: dict[int, BlockId] = {}
    last_use: dict[int, int] = {}
    last_from_host: dict[int, int] = {}
    last_staged: dict[int, int] = {}
    visits: list[Visit] = []
    turn = staged = 0
    blocks = list(schedule)
    num_blocks = max((index for _, index in blocks), default=-1) + 1
    residents, kept = tiers(num_blocks, min(resident_blocks, num_blocks), host_blocks)
    slot_of = {block: place for place, block in enumerate(residents)}
    host_of = dict(
        zip(
            _locked_first(kept, len(pinned)),
            sorted(range(len(kept)), key=lambda buffer: buffer not in pinned),
            strict=True,
        )
    )
    for number, block in enumerate(blocks):
        index = block[1]
        if index in slot_of:
            slot = slot_of[index]
        else:
            slot = resident_blocks + turn % ring_slots
            turn += 1
        load = in_slot.get(slot) != block
        host = host_of.get(index)
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
        visits.append(
            Visit(
                block,
                slot,
                load,
                last_use.get(slot, NEVER),
                host,
                read,
                stage,
                stage_after,
                host_after,
            )
        )
        in_slot[slot] = block
        last_use[slot] = number
    return visits
