"""Tiles per architecture, fixed: results and speed depend on no autotuner's mood. `scripts/tune.py` measures candidates.

int8 products are exact, so no tile changes a bit of them; e4m3 products and attention are sums whose order the tile fixes, so one tile
serves every M and no memory budget changes a bit.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

from lowvram.errors import UnsupportedError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100")
INTERPRETER = "interpreter"


class LinearTile(NamedTuple):
    """What one program of the GEMM computes, and how."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class AttentionTile(NamedTuple):
    """Queries per program; keys per step are the contract's 64."""

    block_m: int
    warps: int
    stages: int


# 128x256 and 256x128 with 8 warps spill on sm_86 and sm_89 (kernels 2.9); 4 stages of 128x128x128 take 96 of their 99 KB.
_SQUARE = LinearTile(128, 128, 128, 8, 4)
_DECODED = LinearTile(128, 128, 64, 8, 3)
_LINEAR = {
    "sm_80": {"int8": _SQUARE, "decode": _DECODED},
    "sm_86": {"int8": _SQUARE, "decode": _DECODED},
    "sm_89": {"int8": _SQUARE, "fp8": _SQUARE},
    "sm_90": {"int8": _SQUARE, "fp8": _SQUARE},
    "sm_120": {"int8": _SQUARE, "fp8": _SQUARE},
    "gfx1100": {"int8": LinearTile(128, 128, 64, 8, 2), "decode": LinearTile(128, 128, 32, 8, 2)},
    INTERPRETER: {"int8": LinearTile(32, 64, 128, 4, 1), "decode": LinearTile(32, 64, 128, 4, 1)},
}
# The residual of 128x256 next to its accumulator spills on sm_90, and so do the two accumulators of e4m3: int8 alone is that wide.
_WIDE_STORE = {"sm_90": LinearTile(128, 256, 128, 8, 3)}
_ATTENTION = {
    "sm_80": AttentionTile(128, 8, 3),
    "sm_86": AttentionTile(128, 8, 3),
    "sm_89": AttentionTile(128, 8, 3),
    "sm_90": AttentionTile(128, 8, 3),
    "sm_120": AttentionTile(128, 8, 3),
    "gfx1100": AttentionTile(64, 16, 1),
    INTERPRETER: AttentionTile(64, 4, 1),
}


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> str:
    """The row of the tables for a device. Raises `UnsupportedError` for one without a row."""
    return INTERPRETER if interpreted() else _architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
        if name in ARCHITECTURES:
            return name
        raise UnsupportedError(f"no tiles for {name}: supported are {', '.join(ARCHITECTURES)}")
    return nvidia_row(torch.cuda.get_device_capability(index))


def nvidia_row(capability: tuple[int, int]) -> str:
    """The row of a compute capability: its own, or the newest older one of the same instructions."""
    major, minor = capability
    if major < 8:
        raise UnsupportedError(f"compute capability {major}.{minor} has no 8-bit tensor cores that Triton can use: 8.0 or later is needed")
    rows = {8: "sm_80" if minor == 0 else "sm_86" if minor < 9 else "sm_89", 9: "sm_90"}
    return rows.get(major, "sm_120")


def multiplies_e4m3(arch: str) -> bool:
    """Whether its tensor cores take e4m3; elsewhere it is decoded to fp16."""
    return arch in ("sm_89", "sm_90", "sm_120")


def linear_kind(arch: str, int8: bool) -> str:
    """How operands are multiplied: `int8`, `fp8` (e4m3 as it is) or `decode` (e4m3 as fp16)."""
    return "int8" if int8 else "fp8" if multiplies_e4m3(arch) else "decode"


def linear_tile(arch: str, kind: str, accumulate: bool) -> LinearTile:
    """The tile of one of `linear_kind`, whatever M; `accumulate`: the residual is added in the epilogue."""
    if kind == "int8" and not accumulate and arch in _WIDE_STORE:
        return _WIDE_STORE[arch]
    return _LINEAR[arch][kind]


def attention_tile(arch: str) -> AttentionTile:
    return _ATTENTION[arch]


def row_warps(elements: int) -> int:
    """Warps of a kernel whose program holds `elements` values: at most 32 each thread."""
    return min(16, max(1, elements // 1024))
