"""Triton kernel of `rms_rope_quantize`: one token per program, one scale per token and head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels.common_triton import (
    INT8_MAX,
    absmax_of_bits,
    quantized_codes,
    size_bits,
    turn_heads,
)
from lowvram_kernels.tuning import row_warps


# stride_scale_h depends on the number of tokens; unspecialized, one variant serves every number.
@triton.jit(do_not_specialize=["stride_scale_h"])
def rms_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    smoothing_ptr,
    out_ptr,
    out_scale_ptr,
    H,
    stride_x,
    stride_cos,
    stride_out_h,
    stride_out_m,
    stride_scale_h,
    stride_scale_m,
    eps,
    HAS_ROPE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Process one token, [HEADS, HEAD_DIM]; HEADS is H rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    channel = tl.arange(0, HEAD_DIM)
    position = heads[:, None] * HEAD_DIM + channel[None, :]
    inside = (heads < H)[:, None]
    x = tl.load(x_ptr + row * stride_x + position, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / (H * HEAD_DIM)
    y = x * tl.rsqrt(mean + eps) * tl.load(weight_ptr + position, mask=inside, other=0.0)
    if HAS_ROPE:
        pair = tl.arange(0, HEAD_DIM // 2)
        c = tl.load(cos_ptr + row * stride_cos + pair)[None, :]
        s = tl.load(sin_ptr + row * stride_cos + pair)[None, :]
        even, odd = tl.split(tl.reshape(y, (HEADS, HEAD_DIM // 2, 2)))
        y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (HEADS, HEAD_DIM))
    if HAS_SMOOTHING:
        y = y - tl.load(smoothing_ptr + position, mask=inside, other=0.0)
    y = turn_heads(y, HEADS, HEAD_DIM)
    absmax = absmax_of_bits(tl.max(size_bits(y), axis=1))
    scale = tl.div_rn(absmax, tl.full((HEADS,), INT8_MAX, tl.float32))
    codes = quantized_codes(y, scale[:, None], False)
    first = heads.to(tl.int64)
    tl.store(
        out_ptr + (first * stride_out_h + row * stride_out_m)[:, None] + channel[None, :],
        codes,
        mask=inside,
    )
    tl.store(out_scale_ptr + first * stride_scale_h + row * stride_scale_m, scale, mask=heads < H)


def rms_rope_quantize(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    smoothing: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
) -> None:
    """Triton implementation of `rms_rope_quantize.rms_rope_quantize`; same contract."""
    num_heads, rows, head_dim = out.shape
    padded = triton.next_power_of_2(num_heads)
    rope = cos is not None and sin is not None
    rms_rope_kernel[(rows,)](
        x,
        weight,
        cos if rope else weight,
        sin if rope else weight,
        weight if smoothing is None else smoothing,
        out,
        out_scale,
        num_heads,
        x.stride(0),
        head_dim // 2,
        out.stride(0),
        out.stride(1),
        out_scale.stride(0),
        out_scale.stride(1),
        eps,
        HAS_ROPE=rope,
        HAS_SMOOTHING=smoothing is not None,
        HEADS=padded,
        HEAD_DIM=head_dim,
        num_warps=row_warps(padded * head_dim),
        enable_fp_fusion=False,
    )
