"""Tiles per architecture, fixed: results and speed depend on no autotuner's mood. `scripts/tune.py`
measures candidates.

int8 products are exact, so no tile changes a bit of them; e4m3 products and attention are sums
whose order the tile fixes, so one tile serves every M and no memory budget changes a bit.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

from lowvram_kernels.errors import UnsupportedOpError

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
    """Queries per program; keys per step are the contract's 64. half_sum: a float PV sums one tile
    of keys in fp16.
    """

    block_m: int
    warps: int
    stages: int
    half_sum: bool = False


# 128x256 and 256x128 with 8 warps spill on sm_86 and sm_89 (kernels 2.9); 4 stages of 128x128x128
# take 96 of their 99 KB.
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
# Next to an accumulator of 128x256 the residual spills on sm_90, and so do GELU and the second
# accumulator of e4m3: only int8 that is stored as it is can be that wide.
_WIDE_STORE = {"sm_90": LinearTile(128, 256, 128, 8, 3)}
_TILE = AttentionTile(128, 8, 3)
# GeForce cards multiply fp16 and e4m3 at twice the rate where the sum is fp16 (kernels 2.1, 2.3).
# An fp32 sum spills on sm_80.
_HALF_SUM_TILE = AttentionTile(128, 8, 3, half_sum=True)
_ATTENTION = {
    "sm_80": {"int8": _TILE, "fp16": _HALF_SUM_TILE},
    "sm_86": {"int8": _TILE, "fp16": _HALF_SUM_TILE},
    "sm_89": {"int8": _TILE, "fp16": _HALF_SUM_TILE, "fp8": _HALF_SUM_TILE},
    "sm_90": {"int8": _TILE, "fp16": _TILE, "fp8": _TILE},
    "sm_120": {"int8": _TILE, "fp16": _HALF_SUM_TILE, "fp8": _HALF_SUM_TILE},
    # 64 spill with Triton 3.8 and later
    "gfx1100": {"int8": AttentionTile(64, 16, 1), "fp16": AttentionTile(32, 16, 1)},
    INTERPRETER: {
        "int8": AttentionTile(64, 4, 1),
        "fp16": AttentionTile(64, 4, 1, half_sum=True),
        "fp8": AttentionTile(64, 4, 1),
    },
}
# 128 queries with heads of 128 in int8 take all registers on sm_120 and spill where strides of
# scales are not divisible by 16, as at 720p.
_ATTENTION_128 = {"sm_120": {"int8": AttentionTile(64, 8, 3)}}
PV_DTYPES = {"int8": torch.int8, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
# What the product of probabilities and values is computed in where the user says nothing: the most
# exact of the 8-bit ones. It changes bits, so it follows from no budget;
# `lowvram.planner.workspace.value_bytes` counts on it.
_PV = "int8"


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> str:
    """The row of the tables for a device. Raises `UnsupportedOpError` for one without a row."""
    return (
        INTERPRETER
        if interpreted()
        else _architecture(
            device.index if device.index is not None else torch.cuda.current_device()
        )
    )


@cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
        if name in ARCHITECTURES:
            return name
        raise UnsupportedOpError(f"no tiles for {name}: supported are {', '.join(ARCHITECTURES)}")
    return nvidia_row(torch.cuda.get_device_capability(index))


def nvidia_row(capability: tuple[int, int]) -> str:
    """The row of a compute capability: its own, or that of an older one of the same major version.

    Raises `UnsupportedOpError` for 10.x, 11.x and every other without a row: nothing was compiled
    for their matrix instructions.
    """
    major, minor = capability
    if major < 8:
        raise UnsupportedOpError(
            f"compute capability {major}.{minor} has no 8-bit tensor cores that Triton can "
            f"use: 8.0 or later is needed"
        )
    rows = {
        8: "sm_80" if minor == 0 else "sm_86" if minor < 9 else "sm_89",
        9: "sm_90",
        12: "sm_120",
    }
    if major not in rows:
        raise UnsupportedOpError(
            f"no tiles for compute capability {major}.{minor}: supported are 8.x, 9.x and 12.x"
        )
    return rows[major]


def multiplies_e4m3(arch: str) -> bool:
    """Whether its tensor cores take e4m3; elsewhere it is decoded to fp16."""
    return arch in ("sm_89", "sm_90", "sm_120")


def linear_kind(arch: str, int8: bool) -> str:
    """How operands are multiplied: `int8`, `fp8` (e4m3 as it is) or `decode` (e4m3 as fp16)."""
    return "int8" if int8 else "fp8" if multiplies_e4m3(arch) else "decode"


def linear_tile(arch: str, kind: str, plain: bool) -> LinearTile:
    """The tile of one of `linear_kind`, whatever M; `plain`: the epilogue neither adds to the
    residual nor applies GELU.
    """
    if kind == "int8" and plain and arch in _WIDE_STORE:
        return _WIDE_STORE[arch]
    return _LINEAR[arch][kind]


def attention_tile(arch: str, pv: str, head_dim: int) -> AttentionTile:
    """pv: one of `pv_choices(arch)`. No more warps than can each load 16 bytes a thread of the keys
    of one step.
    """
    tile = (_ATTENTION_128.get(arch, {}) if head_dim == 128 else {}).get(pv, _ATTENTION[arch][pv])
    return tile._replace(warps=min(tile.warps, head_dim // 8))


def pv_choices(arch: str) -> tuple[str, ...]:
    """What the second product of attention can be computed in there: fp8 takes tensor cores for
    e4m3.
    """
    return tuple(_ATTENTION[arch])


def _values_row(device: torch.device) -> str:
    if device.type != "cuda" or os.environ.get("LOWVRAM_BACKEND") == "reference":
        return INTERPRETER
    try:
        return architecture(device)
    except UnsupportedOpError:  # no kernel is for this GPU
        return INTERPRETER


def pv_dtype(device: torch.device) -> torch.dtype:
    """The dtype that values are stored and multiplied in: `LOWVRAM_PV=int8|fp16|fp8`, else int8.

    Where the references run, they take all three. Raises `UnsupportedOpError` for another word, and
    for one that the architecture cannot multiply.
    """
    arch = _values_row(device)
    wanted = os.environ.get("LOWVRAM_PV") or _PV
    if wanted not in pv_choices(arch):
        raise UnsupportedOpError(
            f"LOWVRAM_PV={wanted} on {arch}: use one of {', '.join(pv_choices(arch))}"
        )
    return PV_DTYPES[wanted]


def row_warps(elements: int) -> int:
    """Warps of a kernel whose program holds `elements` values: at most 32 each thread."""
    return min(16, max(1, elements // 1024))
