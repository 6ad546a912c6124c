"""What torch's caching allocator takes of a device for tensors of given sizes: arithmetic on its
segments.
"""

from __future__ import annotations

from collections.abc import Sequence

# torch's caching allocator takes segments from the driver (c10/core/AllocatorConfig.h): small
# tensors share segments of 2 MiB, those up to 10 MiB segments of 20 MiB, larger ones have their
# own, rounded up to 2 MiB. What is left of a segment is used by others where it fits.
SMALL_BYTES, SMALL_SEGMENT_BYTES = 1 << 20, 2 << 20
LARGE_BYTES, SEGMENT_BYTES, SEGMENT_STEP_BYTES = 10 << 20, 20 << 20, 2 << 20
ALLOCATION_STEP_BYTES = 512
# Segments of either kind that short-lived tensors open beside those of the buffers that a phase is
# known to hold.
PASSING_SEGMENTS = 3


def segment_bytes(nbytes: int) -> int:
    """What torch's allocator takes of a device for the first of its tensors that has this size."""
    if nbytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if nbytes < LARGE_BYTES:
        return SEGMENT_BYTES
    return -(-nbytes // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES


def packed_bytes(nbytes: int) -> int:
    """What one of many buffers of this size takes of a device: its own segment, or its share of
    one.
    """
    segment = segment_bytes(nbytes)
    return -(-segment // (segment // nbytes))


def segments_bytes(sizes: Sequence[int]) -> int:
    """What tensors of these sizes, made one after the other in an empty cache, take of a device:
    each goes where it fits best.
    """
    total = 0
    # what is left of small and of other segments
    free: dict[bool, list[int]] = {True: [], False: []}
    for nbytes in sizes:
        small = nbytes <= SMALL_BYTES
        size = -(-nbytes // ALLOCATION_STEP_BYTES) * ALLOCATION_STEP_BYTES
        room = min((left for left in free[small] if left >= size), default=0)
        if room:
            free[small].remove(room)
        else:
            room = segment_bytes(size)
            total += room
        if room - size > (0 if small else SMALL_BYTES):  # a smaller rest is not split off
            free[small].append(room - size)
    return total


def phase_rounding_bytes(buffers: Sequence[int]) -> int:
    """VRAM that torch's allocator takes in another phase beyond the tensors in it. buffers: sizes
    of the large ones.
    """
    return segments_bytes(buffers) - sum(buffers) + passing_bytes()


def passing_bytes() -> int:
    """VRAM of the segments that short-lived tensors open."""
    return PASSING_SEGMENTS * (SEGMENT_BYTES + SMALL_SEGMENT_BYTES)
