"""The rows that a torch reference works on at a time, so that its temporaries are bounded and no budget changes a bit."""

from __future__ import annotations

from collections.abc import Iterator

# A multiple of the 64 keys of an attention tile. The planner counts with it too (`lowvram.memory.phases`).
REFERENCE_ROWS = 256


def row_slices(count: int) -> Iterator[slice]:
    """0 .. `count` in slices of `REFERENCE_ROWS`, the last one shorter."""
    for start in range(0, count, REFERENCE_ROWS):
        yield slice(start, min(start + REFERENCE_ROWS, count))
