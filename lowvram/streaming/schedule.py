"""The order in which blocks are visited and the buffers each one passes: pure arithmetic, so that
it can be checked by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

BlockId = tuple[str, int]
NEVER = -1


@dataclass(frozen=True)
class Visit:
    """One use of one block. `slot`: where on the device; `load`: whether bytes must be brought
    there first; `after`: the earlier visit that must be over before this slot may be overwritten
    (-1: none).

    `host`: the RAM buffer that keeps the block (None: none does); `read`: whether the disk must be
    read; `host_after`: the earlier visit that was the last to load what the RAM buffer held before.
    `stage`: the staging buffer that the load passes (None: it goes straight from the RAM buffer, or
    from the disk into the slot); `stage_after`: the earlier visit whose copy must have left it.
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
    """`count` of the numbers 0 .. total - 1, evenly apart; the last number is always one of
    them.
    """
    return [
        number for number in range(total) if (number + 1) * count // total > number * count // total
    ]


def tiers(num_blocks: int, resident_blocks: int, host_blocks: int) -> tuple[list[int], list[int]]:
    """(blocks that stay on the device, blocks that are kept in RAM), of one component.

    Both are fixed sets, because a cyclic scan defeats any least-recently-used cache, and both are
    spread: what travels has the time of the blocks between to arrive, and what comes from the disk
    that of the ones from RAM.
    """
    travelling = spread(num_blocks - resident_blocks, num_blocks)
    from_disk = {
        travelling[place]
        for place in spread(max(0, len(travelling) - host_blocks), len(travelling))
    }
    away = set(travelling)
    return [block for block in range(num_blocks) if block not in away], [
        block for block in travelling if block not in from_disk
    ]


def _locked_first(kept: list[int], pinned: int) -> list[int]:
    """`kept` with those first that get page-locked buffers: spread as well, since the others take a
    copy more on their way.
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
    """Slots 0 .. resident-1 keep blocks of the component at work, host buffers others, as `tiers`
    says; the ring is for all that travel.

    schedule: whole passes through a component's blocks. When the component changes (the expert
    switch), its blocks take the same slots over as they are first visited. Loads take turns at the
    staging buffers, but for those whose host buffer is one of `pinned`; without staging none does.
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
