"""Model of torch's caching allocator: device memory that it reserves for given tensors."""

from __future__ import annotations

from collections.abc import Sequence

# torch's caching allocator requests segments from the driver (c10/core/AllocatorConfig.h): tensors
# up to 1 MiB share segments of 2 MiB, those below 10 MiB share segments of 20 MiB, larger ones have
# their own, rounded up to 2 MiB. The remainder of a segment serves other tensors that fit.
SMALL_BYTES, SMALL_SEGMENT_BYTES = 1 << 20, 2 << 20
LARGE_BYTES, SEGMENT_BYTES, SEGMENT_STEP_BYTES = 10 << 20, 20 << 20, 2 << 20
ALLOCATION_STEP_BYTES = 512
# Segments of each kind for short-lived tensors, beside those of a phase's known buffers.
PASSING_SEGMENTS = 3


def segment_bytes(nbytes: int) -> int:
    """Size of the segment that the allocator reserves for a first tensor of `nbytes`."""
    if nbytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if nbytes < LARGE_BYTES:
        return SEGMENT_BYTES
    return -(-nbytes // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES


def packed_bytes(nbytes: int) -> int:
    """Reserved bytes per buffer, for many buffers of `nbytes`: a segment, or a share of one."""
    segment = segment_bytes(nbytes)
    return -(-segment // (segment // nbytes))


def segments_bytes(sizes: Sequence[int]) -> int:
    """Bytes reserved for tensors of these sizes, allocated in this order from an empty cache.

    Each tensor takes the smallest free remainder that fits (best fit).
    """
    total = 0
    # remainders of small (True) and of other (False) segments
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
        if room - size > (0 if small else SMALL_BYTES):  # smaller remainders are not split off
            free[small].append(room - size)
    return total


def phase_rounding_bytes(buffers: Sequence[int]) -> int:
    """VRAM that the allocator reserves beyond a phase's tensors, outside loop and VAE.

    buffers: sizes of the phase's large tensors.
    """
    return segments_bytes(buffers) - sum(buffers) + passing_bytes()


def passing_bytes() -> int:
    """VRAM of the segments for short-lived tensors."""
    return PASSING_SEGMENTS * (SEGMENT_BYTES + SMALL_SEGMENT_BYTES)
