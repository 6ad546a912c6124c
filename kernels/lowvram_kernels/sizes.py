"""Tile and slice sizes shared by the kernels, the torch references and the memory planner.

The references work in slices of fixed size. That bounds their temporaries, keeps them in the CPU
cache, and makes results independent of the memory budget. This module does not import torch,
because the planner uses it.
"""

from __future__ import annotations

from collections.abc import Iterator

# Keys of one attention tile.
KEY_TILE = 64
# Rows of one slice of a product; a multiple of `KEY_TILE`.
REFERENCE_ROWS = 256
# fp32 values of one temporary: half a MiB. Freed buffers of a MiB and more are returned to the
# system (`lowvram.memory.malloc`), and the page faults of new ones cost more time than the
# arithmetic on them.
REFERENCE_VALUES = 1 << 17


def row_slices(count: int, width: int = 1) -> Iterator[slice]:
    """Yield slices of range(count) with at most `REFERENCE_ROWS` rows.

    width: values per row; a slice has at most `REFERENCE_VALUES` values, but at least one row.
    """
    yield from _slices(count, max(1, min(REFERENCE_ROWS, REFERENCE_VALUES // width)))


def output_slices(count: int) -> Iterator[slice]:
    """Yield slices of the outputs of a product such that one has `REFERENCE_VALUES` results.

    count: the number of outputs; the product has `REFERENCE_ROWS` rows.
    """
    yield from _slices(count, REFERENCE_VALUES // REFERENCE_ROWS)


def _slices(count: int, length: int) -> Iterator[slice]:
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))
