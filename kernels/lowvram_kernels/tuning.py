"""Fixed tile sizes of the kernels per GPU architecture, and the dtype of attention values.

There is no autotuning, so results and speed are reproducible; `scripts/tune.py` measures
candidates. int8 products are exact with any tile. The tile fixes the order of the sums of e4m3
products and of attention; one tile serves every M, so the memory budget does not change a result.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch

from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.sizes import KEY_TILE, PLAIN_KEY_TILE, STORED_VALUES, values_name

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100")
INTERPRETER = "interpreter"


class LinearTile(NamedTuple):
    """Tile of one GEMM program: [block_m, block_n] outputs in steps of block_k over K.

    warps, stages: Triton's `num_warps` and `num_stages`. parts: the results leave in so many parts
    of the columns.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int = 1


class AttentionTile(NamedTuple):
    """Tile of one attention program: block_m queries, `keys` keys a step.

    warps, stages: Triton's `num_warps` and `num_stages`. half_sum: with fp16 or e4m3 values, the
    product over one tile of keys is accumulated in fp16. registers: a limit per thread below the
    architecture's, at which the assembler spills none; None: no limit.
    """

    block_m: int
    warps: int
    stages: int
    half_sum: bool = False
    keys: int = KEY_TILE
    registers: int | None = None


# 128x256 asks the L2 cache for three quarters of what 128x128 does. The results leave in four
# parts: with the residual of a whole tile beside the sums, the assembler spills. The second
# accumulator of e4m3 on sm_90 fits the registers as 256x128 alone.
_WIDE = LinearTile(128, 256, 128, 8, 3, parts=4)
_TALL = LinearTile(256, 128, 128, 8, 3, parts=4)
_DECODED = LinearTile(256, 128, 64, 8, 3, parts=4)
_SQUARE = LinearTile(128, 128, 128, 8, 4)
_LINEAR = {
    "sm_80": {"int8": _WIDE, "decode": _DECODED},
    "sm_86": {"int8": _WIDE, "decode": _DECODED},
    "sm_89": {"int8": _WIDE, "fp8": _WIDE},
    "sm_90": {"int8": _WIDE, "fp8": _TALL},
    "sm_120": {"int8": _WIDE, "fp8": _WIDE},
    "gfx1100": {"int8": LinearTile(128, 128, 64, 8, 2), "decode": LinearTile(128, 128, 32, 8, 2)},
    INTERPRETER: {
        "int8": LinearTile(32, 64, 128, 4, 1, parts=4),
        "decode": LinearTile(32, 64, 128, 4, 1, parts=4),
    },
}
_TILE = AttentionTile(128, 8, 3)
# GeForce cards multiply fp16 and e4m3 at twice the rate with an fp16 accumulator (kernels 2.1,
# 2.3). On sm_80 an fp32 accumulator spills registers.
_HALF_SUM_TILE = AttentionTile(128, 8, 3, half_sum=True)
_ATTENTION = {
    "sm_80": {"int8": _TILE, "fp16": _HALF_SUM_TILE},
    "sm_86": {"int8": _TILE, "fp16": _HALF_SUM_TILE},
    "sm_89": {"int8": _TILE, "fp16": _HALF_SUM_TILE, "fp8": _HALF_SUM_TILE},
    "sm_90": {
        "int8": _TILE,
        "fp16": _TILE,
        "fp8": _TILE,
        "bf16": AttentionTile(128, 8, 2, keys=PLAIN_KEY_TILE),
    },
    "sm_120": {"int8": _TILE, "fp16": _HALF_SUM_TILE, "fp8": _HALF_SUM_TILE},
    # fp16: 32 queries spill registers with Triton 3.7.
    "gfx1100": {"int8": AttentionTile(64, 16, 1), "fp16": AttentionTile(16, 16, 1)},
    INTERPRETER: {
        "int8": AttentionTile(64, 4, 1),
        "fp16": AttentionTile(64, 4, 1, half_sum=True),
        "fp8": AttentionTile(64, 4, 1),
        "bf16": AttentionTile(64, 4, 1, keys=PLAIN_KEY_TILE),
    },
}
# Heads of 128 with int8 values. Without a limit the assembler spills 8 to 72 bytes.
_ATTENTION_128 = {
    "sm_80": {"int8": _TILE._replace(registers=240)},
    "sm_86": {"int8": _TILE._replace(registers=220)},
    "sm_89": {"int8": _TILE._replace(registers=220)},
    "sm_120": {"int8": _TILE._replace(registers=240)},
}
PV_DTYPES = {
    "int8": torch.int8,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
}


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> str:
    """Return a device's key in the tile tables: one of `ARCHITECTURES`, or `INTERPRETER`.

    Raises `UnsupportedOpError` for a GPU that the tables do not list, and without one.
    """
    if interpreted():
        return INTERPRETER
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        return _architecture(index)
    except AssertionError as error:  # torch was built without CUDA
        raise UnsupportedOpError(f"torch finds no CUDA or ROCm device: {error}") from None


@cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
        if name in ARCHITECTURES:
            return name
        raise UnsupportedOpError(f"no tiles for {name}: supported are {', '.join(ARCHITECTURES)}")
    return nvidia_row(torch.cuda.get_device_capability(index))


def nvidia_row(capability: tuple[int, int]) -> str:
    """Return the table key of a compute capability: its own or an older one of the same major.

    Raises `UnsupportedOpError` for capabilities below 8.0, for 10.x, 11.x and all others: no kernel
    was compiled for their matrix instructions.
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
    """Return whether the tensor cores of `arch` multiply e4m3; others get it decoded to fp16."""
    return arch in ("sm_89", "sm_90", "sm_120")


def linear_kind(arch: str, int8: bool) -> str:
    """Return how operands are multiplied: "int8", "fp8" (e4m3) or "decode" (e4m3 as fp16)."""
    return "int8" if int8 else "fp8" if multiplies_e4m3(arch) else "decode"


def linear_tile(arch: str, kind: str, *, prefetches: bool = False) -> LinearTile:
    """Return the GEMM tile, the same for every M and every epilogue.

    kind: as returned by `linear_kind`; prefetches: the compiler keeps the operands of the next
    products in registers, which then hold no wider tile than 128x128.
    """
    return _SQUARE if prefetches and kind != "decode" else _LINEAR[arch][kind]


def attention_tile(arch: str, pv: str, head_dim: int) -> AttentionTile:
    """Return the attention tile; pv: one of `pv_choices(arch)`.

    Of heads of 64, quantized values come in halves too small for 16-byte loads by 8 warps on
    NVIDIA; 4 warps then take half of the queries.
    """
    if head_dim == 128:
        return _ATTENTION_128.get(arch, {}).get(pv, _ATTENTION[arch][pv])
    tile = _ATTENTION[arch][pv]
    if arch.startswith("sm_") and STORED_VALUES[pv].scaled:
        return tile._replace(block_m=tile.block_m // 2, warps=tile.warps // 2)
    return tile._replace(warps=min(tile.warps, head_dim // 8))


def pv_choices(arch: str) -> tuple[str, ...]:
    """Return the keys of `PV_DTYPES` that `arch` supports; fp8 needs tensor cores for e4m3."""
    return tuple(_ATTENTION[arch])


def _pv_architecture(device: torch.device) -> str:
    """Return `architecture(device)`, or `INTERPRETER` if the torch references run there."""
    if device.type != "cuda" or os.environ.get("LOWVRAM_BACKEND") == "reference":
        return INTERPRETER
    try:
        return architecture(device)
    except UnsupportedOpError:  # no kernel supports this GPU
        return INTERPRETER


def pv_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which attention values are stored and multiplied.

    Set with `LOWVRAM_PV=int8|fp16|fp8|bf16`; default as in `sizes.values_name`. The references
    support all four. Raises `UnsupportedOpError` for another value, and for one that the
    architecture does not support.
    """
    arch = _pv_architecture(device)
    pv = values_name(arch)
    if pv not in pv_choices(arch):
        raise UnsupportedOpError(
            f"LOWVRAM_PV={pv} on {arch}: use one of {', '.join(pv_choices(arch))}"
        )
    return PV_DTYPES[pv]


def values_of(dtype: torch.dtype) -> str:
    """Return the key of `PV_DTYPES` and `sizes.STORED_VALUES` of a dtype of stored values."""
    return next(name for name, stored in PV_DTYPES.items() if stored == dtype)


def row_warps(elements: int) -> int:
    """Return the warps of a row kernel: one per 1024 elements of a program, from 1 to 16."""
    return min(16, max(1, elements // 1024))
