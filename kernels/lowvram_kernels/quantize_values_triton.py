"""Triton kernel of `quantize_values`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels import sizes
from lowvram_kernels.common_triton import absmax_of_bits, quantized_codes, size_bits
from lowvram_kernels.quantize_values import SUM_START, value_max

KEY_TILE = tl.constexpr(sizes.KEY_TILE)
START = tl.constexpr(SUM_START)


# M depends on the number of tokens. Unspecialized, one variant serves every number, divisible by 16
# or not.
@triton.jit(do_not_specialize=["M"])
def values_kernel(
    v_ptr,
    out_ptr,
    out_scale_ptr,
    M,
    stride_v,
    stride_out_h,
    stride_out_d,
    stride_scale_h,
    stride_scale_t,
    HEAD_DIM: tl.constexpr,
    VALUE_MAX: tl.constexpr,
):
    """Quantize one tile of 64 keys of one head.

    [64, HEAD_DIM] -> [HEAD_DIM, 64] int8, fp16 or e4m3 bytes, and HEAD_DIM pairs of scale and
    offset.
    """
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    keys = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    channel = tl.arange(0, HEAD_DIM)
    values = tl.load(
        v_ptr + keys[:, None] * stride_v + head * HEAD_DIM + channel[None, :],
        mask=(keys < M)[:, None],
        other=0.0,
    )
    values = values.to(tl.float32)
    absmax = absmax_of_bits(tl.max(size_bits(values), axis=0))
    scale = tl.div_rn(absmax, tl.full((HEAD_DIM,), VALUE_MAX, tl.float32))
    if out_ptr.dtype.element_ty == tl.int8:
        codes = quantized_codes(values, scale[None, :], False)
    elif out_ptr.dtype.element_ty == tl.uint8:
        codes = quantized_codes(values, scale[None, :], True)
    else:
        codes = tl.div_rn(values, tl.broadcast_to(scale[None, :], values.shape)).to(tl.float16)
    tl.store(
        out_ptr + head * stride_out_h + channel[:, None] * stride_out_d + keys[None, :],
        tl.trans(codes),
    )
    scale_ptrs = out_scale_ptr + head * stride_scale_h + tile * stride_scale_t
    tl.store(scale_ptrs + 2 * channel, scale)
    if out_ptr.dtype.element_ty == tl.int8:
        total = tl.sum(codes.to(tl.int32), axis=0)
        offset = (total * 128 - START).to(tl.float32) * scale
    else:
        offset = tl.zeros_like(scale)
    tl.store(scale_ptrs + 2 * channel + 1, offset)


def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """Triton implementation of `quantize_values.quantize_values`; same contract."""
    num_heads, head_dim, _ = out.shape
    codes = out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out
    values_kernel[(out_scale.shape[1], num_heads)](
        v,
        codes,
        out_scale,
        v.shape[0],
        v.stride(0),
        out.stride(0),
        out.stride(1),
        out_scale.stride(0),
        out_scale.stride(1),
        HEAD_DIM=head_dim,
        VALUE_MAX=value_max(out),
        num_warps=8,  # with 4 the assembler spills heads of 64 on sm_90
        enable_fp_fusion=False,
    )
