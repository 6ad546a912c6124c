"""Tile and slice sizes shared by the kernels, the torch references and the memory planner.

The references work in slices of fixed size. That bounds their temporaries, keeps them in the CPU
cache, and makes results independent of the memory budget. This module does not import torch,
because the planner uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from lowvram_kernels.errors import UnsupportedOpError

# Keys of one tile of quantized values.
KEY_TILE = 64
# Keys of one step of attention over values that are not quantized.
PLAIN_KEY_TILE = 128

# The largest finite value of float16, in which activations are stored between ops. Larger ones are
# clamped to it.
FLOAT16_MAX = 65504.0


class StoredValues(NamedTuple):
    """How attention values are stored.

    value_bytes: of one. scaled: quantized, with a scale and an offset per channel and tile of
    `KEY_TILE` keys; otherwise as they are, with neither.
    """

    value_bytes: int
    scaled: bool


# By the names of `tuning.PV_DTYPES`.
STORED_VALUES = {
    "int8": StoredValues(1, True),
    "fp16": StoredValues(2, True),
    "fp8": StoredValues(1, True),
    "bf16": StoredValues(2, False),
}


# Values of the text, on every architecture: in int8 they cost 1.4 dB of the demo's clips, and their
# products are under 1 % of a block's (docs/benchmarks/fidelity.md). Also those of refined steps.
EXACT_VALUES = "fp16"


def values_name(arch: str) -> str:
    """Return the name of the values' dtype on an architecture: `LOWVRAM_PV`, else the default.

    Raises `UnsupportedOpError` if `LOWVRAM_PV` is no key of `STORED_VALUES`.
    """
    name = os.environ.get("LOWVRAM_PV") or default_values(arch)
    if name not in STORED_VALUES:
        raise UnsupportedOpError(f"LOWVRAM_PV={name}: use one of {', '.join(STORED_VALUES)}")
    return name


def default_values(arch: str) -> str:
    """Return the name of the values' default dtype on an architecture.

    int8 is the most accurate 8-bit dtype, and everywhere but on sm_90 the fastest that is as
    accurate. There converting int8 sums takes longer than the products, and bf16 is faster
    (docs/benchmarks/kernels.md). The dtype changes results, so no memory budget selects it.
    """
    return "bf16" if arch == "sm_90" else "int8"


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
