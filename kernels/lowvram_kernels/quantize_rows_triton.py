"""Triton kernel of `quantize_rows` and `gelu_quantize`: one row per program, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels.common_triton import GROUP, store_row
from lowvram_kernels.tuning import row_warps


@triton.jit
def gelu_tanh(x):
    """Return x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): GELU, tanh approximation."""
    u = (x + 0.044715 * (x * x * x)) * 1.5957691216057308
    return tl.div_rn(x, tl.exp(-u) + 1.0)


@triton.jit
def rows_kernel(
    x_ptr, out_ptr, out_scale_ptr, low_ptr, low_scale_ptr, K, stride_x, stride_out,
    GROUPS: tl.constexpr, ROTATED: tl.constexpr, E4M3: tl.constexpr, LOW: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """Quantize one row, after GELU if GELU."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * stride_x + channels, mask=channels < K, other=0.0).to(tl.float32)
    if GELU:
        x = gelu_tanh(x)
    store_row(
        x, out_ptr, out_scale_ptr, low_ptr, low_scale_ptr, row, stride_out, K,
        GROUPS, ROTATED, E4M3, LOW,
    )  # fmt: skip


def groups_of(channels: int) -> int:
    """Return the number of 256-channel groups of a row, rounded up to a power of two."""
    return int(triton.next_power_of_2(triton.cdiv(channels, 256)))


def code_view(out: Tensor, rotated: bool) -> Tensor:
    """Return `out` as the kernels write it: int32 words if rotated, else int8 or e4m3 bytes."""
    if rotated:
        return out.view(torch.int32)
    return out if out.dtype == torch.int8 else out.view(torch.uint8)


def _run(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    rotated: bool,
    gelu: bool,
    low: Tensor | None,
    low_scale: Tensor | None,
) -> None:
    codes, groups = code_view(out, rotated), groups_of(x.shape[1])
    rows_kernel[(x.shape[0],)](
        x,
        codes,
        out_scale,
        codes if low is None else code_view(low, rotated),
        out_scale if low_scale is None else low_scale,
        x.shape[1],
        x.stride(0),
        codes.stride(0),
        GROUPS=groups,
        ROTATED=rotated,
        E4M3=out.dtype == torch.float8_e4m3fn,
        LOW=low is not None,
        GELU=gelu,
        num_warps=row_warps(groups * 256),
        enable_fp_fusion=False,
    )


def quantize_rows(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Triton implementation of `quantize_rows.quantize_rows`; same contract."""
    _run(x, out, out_scale, rotated, False, low, low_scale)


def gelu_quantize(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Triton implementation of `quantize_rows.gelu_quantize`; same contract."""
    _run(x, out, out_scale, rotated, True, low, low_scale)
