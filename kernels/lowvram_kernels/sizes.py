"""Sizes that kernels, references and the planner share, and the slices that a reference works on.

A torch reference works in slices, so that its temporaries are bounded, stay in the cache, and no
budget changes a bit. Without torch: the planner counts with these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

# Keys of one attention tile.
KEY_TILE = 64
# Rows of a product, a multiple of `KEY_TILE`.
REFERENCE_ROWS = 256
# fp32 values of one temporary: half a MiB. Buffers of a MiB and more go back to the system when
# they are freed (`lowvram.memory.malloc`), and the page faults of fresh ones cost more than the
# arithmetic on them.
REFERENCE_VALUES = 1 << 17


def row_slices(count: int, width: int = 1) -> Iterator[slice]:
    """0 .. `count` in slices of at most `REFERENCE_ROWS`, and of no more than `REFERENCE_VALUES`
    where each row has `width` values.
    """
    yield from _slices(count, max(1, min(REFERENCE_ROWS, REFERENCE_VALUES // width)))


def output_slices(count: int) -> Iterator[slice]:
    """0 .. `count` outputs of a product of `REFERENCE_ROWS` rows, `REFERENCE_VALUES` results at a
    time.
    """
    yield from _slices(count, REFERENCE_VALUES // REFERENCE_ROWS)


def _slices(count: int, length: int) -> Iterator[slice]:
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))
