"""Triton kernel of `adaln_quantize`; it reads each row of x once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels.common_triton import GROUP, store_row
from lowvram_kernels.quantize_rows_triton import code_view, groups_of
from lowvram_kernels.tuning import row_warps


@triton.jit
def adaln_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, out_scale_ptr, low_ptr, low_scale_ptr,
    K, stride_x, stride_out, eps,
    GROUPS: tl.constexpr, ROTATED: tl.constexpr, E4M3: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Normalize, modulate and quantize one row.

    The variance is the mean of the squared differences from the mean; both passes read registers.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = channels < K
    x = tl.load(x_ptr + row * stride_x + channels, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / K
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / K
    scale = tl.load(scale_ptr + channels, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + channels, mask=inside, other=0.0)
    y = centred * tl.rsqrt(variance + eps) * scale + shift
    store_row(
        y, out_ptr, out_scale_ptr, low_ptr, low_scale_ptr, row, stride_out, K,
        GROUPS, ROTATED, E4M3, LOW,
    )  # fmt: skip


def adaln_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Triton implementation of `adaln_quantize.adaln_quantize`; same contract."""
    codes, groups = code_view(out, rotated), groups_of(x.shape[1])
    adaln_kernel[(x.shape[0],)](
        x,
        scale,
        shift,
        codes,
        out_scale,
        codes if low is None else code_view(low, rotated),
        out_scale if low_scale is None else low_scale,
        x.shape[1],
        x.stride(0),
        codes.stride(0),
        eps,
        GROUPS=groups,
        ROTATED=rotated,
        E4M3=out.dtype == torch.float8_e4m3fn,
        LOW=low is not None,
        num_warps=row_warps(groups * 256),
        enable_fp_fusion=False,
    )
