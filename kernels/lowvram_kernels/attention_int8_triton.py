"""Triton kernels of `attention_int8` (online softmax on tensor cores) and `quantize_values`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels import sizes
from lowvram_kernels.attention_int8 import value_max
from lowvram_kernels.common_triton import (
    BEFORE_3_7,
    absmax_of_bits,
    e4m3_as_float16,
    e4m3_bytes,
    quantized_codes,
    size_bits,
    stored,
)
from lowvram_kernels.tuning import PV_DTYPES, architecture, attention_tile, multiplies_e4m3

KEY_TILE = tl.constexpr(sizes.KEY_TILE)
# 1.5 * 2^23 - 128: adding it to p rounds p half to even and leaves p - 128 in the low byte.
ROUND_LESS_128 = tl.constexpr(12582912.0 - 128.0)
LOG2_255 = tl.constexpr(math.log2(255.0))
LOG2_448 = tl.constexpr(math.log2(448.0))
# Triton's own cast goes through fp16 on sm_89 and rounds twice, which misrounds one p in 256.
FOUR_E4M3 = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
    "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
)


# These arguments depend on the number of tokens. Unspecialized, one variant serves every number,
# divisible by 16 or not.
@triton.jit(do_not_specialize=["M", "stride_scale_d"])
def values_kernel(
    v_ptr,
    out_ptr,
    out_scale_ptr,
    M,
    stride_v,
    stride_out_h,
    stride_out_d,
    stride_scale_h,
    stride_scale_d,
    HEAD_DIM: tl.constexpr,
    VALUE_MAX: tl.constexpr,
):
    """Quantize one tile of 64 keys of one head.

    [64, HEAD_DIM] -> [HEAD_DIM, 64] int8, fp16 or e4m3 bytes, and HEAD_DIM scales.
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
    tl.store(out_scale_ptr + head * stride_scale_h + channel * stride_scale_d + tile, scale)


@triton.jit
def tile_scales(v_scale_ptrs, tile, T, HEAD_DIM: tl.constexpr):
    """Load the value scales of one tile, [HEAD_DIM].

    It reads the scales of four tiles, because the compiler replicates a smaller load in every
    thread.
    """
    near = (tile // 4) * 4 + tl.arange(0, 4)
    scales = tl.load(v_scale_ptrs[:, None] + near[None, :], mask=(near < T)[None, :], other=0.0)
    return tl.sum(tl.where((near == tile)[None, :], scales, 0.0), axis=1)


@triton.jit
def key_scales(k_scale_ptrs, COPIES: tl.constexpr):
    """Load the scales of 64 keys, [64], each COPIES times (see `scale_copies`)."""
    if COPIES == 1:
        return tl.load(k_scale_ptrs)
    return tl.max(tl.load(k_scale_ptrs[:, None] + tl.zeros((1, COPIES), tl.int32)), axis=1)


def scale_copies(arch: str) -> int:
    """Return how many copies of each key scale one step loads.

    Triton 3.6 loads 64 scales in the layout of the logits: sixteen copies of four bytes per thread.
    A load of 4 x 64 scales is too large for that layout, and each thread copies one scale.
    """
    return 4 if BEFORE_3_7 and arch.startswith("sm_") else 1


@triton.jit
def attend_tile(
    result,
    total,
    maximum,
    q,
    query_scale,
    k_ptrs,
    k_scale_ptrs,
    v_ptrs,
    v_scale_ptrs,
    tile,
    T,
    left,
    HEAD_DIM: tl.constexpr,
    HALF_SUM: tl.constexpr,
    SCALE_COPIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Run one online-softmax step over 64 keys and return (result, total, maximum).

    MASKED: only the first `left` keys exist. query_scale includes log2(e) / sqrt(HEAD_DIM).
    """
    key = tl.arange(0, KEY_TILE)
    if MASKED:
        k = tl.load(k_ptrs, mask=(key < left)[None, :], other=0)
        key_scale = tl.load(k_scale_ptrs, mask=key < left, other=0.0)
    else:
        k = tl.load(k_ptrs)
        key_scale = key_scales(k_scale_ptrs, SCALE_COPIES)
    logits = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * key_scale[None, :]
    if MASKED:
        logits = tl.where((key < left)[None, :], logits, float("-inf"))
    # query_scale is positive, so scaling after the maximum gives the same maximum.
    tile_maximum = tl.max(logits, axis=1) * query_scale
    if v_ptrs.dtype.element_ty == tl.int8:
        result, total, maximum = add_int8(
            result,
            total,
            maximum,
            logits,
            query_scale,
            tile_maximum,
            v_ptrs,
            v_scale_ptrs,
            tile,
            T,
            HEAD_DIM,
        )
    else:
        result, total, maximum = add_float(
            result,
            total,
            maximum,
            logits,
            query_scale,
            tile_maximum,
            v_ptrs,
            v_scale_ptrs,
            tile,
            T,
            HEAD_DIM,
            HALF_SUM,
        )
    return result, total, maximum


@triton.jit
def add_int8(
    result,
    total,
    maximum,
    logits,
    query_scale,
    tile_maximum,
    v_ptrs,
    v_scale_ptrs,
    tile,
    T,
    HEAD_DIM: tl.constexpr,
):
    """Accumulate one tile with int8 values.

    p is in 0..255 relative to the tile's maximum. The product uses p - 128, which fits int8, and
    adds 128 times the sum of the values afterwards.
    """
    p = tl.exp2(logits * query_scale[:, None] - (tile_maximum - LOG2_255)[:, None]) + ROUND_LESS_128
    v = tl.load(v_ptrs)
    offset = tl.sum(v.to(tl.int32), axis=1) * 128
    product = (
        tl.dot(p.to(tl.int32, bitcast=True).to(tl.int8), tl.trans(v), out_dtype=tl.int32)
        + offset[None, :]
    )
    new_maximum = tl.maximum(maximum, tile_maximum)
    decay = tl.exp2(maximum - new_maximum)
    weight = tl.exp2(tile_maximum - new_maximum)
    total = total * decay + tl.sum(p - ROUND_LESS_128, axis=1) * weight
    values = product.to(tl.float32) * tile_scales(v_scale_ptrs, tile, T, HEAD_DIM)[None, :]
    return result * decay[:, None] + values * weight[:, None], total, new_maximum


@triton.jit
def e4m3(p):
    """Convert fp32 to e4m3 with one rounding, half to even; NVIDIA sm_89 or later."""
    codes = tl.inline_asm_elementwise(
        FOUR_E4M3, "=r,r,r,r,r", [p], dtype=tl.uint8, is_pure=True, pack=4
    )
    return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit
def add_float(
    result,
    total,
    maximum,
    logits,
    query_scale,
    tile_maximum,
    v_ptrs,
    v_scale_ptrs,
    tile,
    T,
    HEAD_DIM: tl.constexpr,
    HALF_SUM: tl.constexpr,
):
    """Accumulate one tile with fp16 or e4m3 values.

    p is 1 (fp16) or 448 (e4m3) at the running maximum. The product of each tile starts at zero, so
    that sums in fp16, or of e4m3 products, for which tensor cores keep 14 to 22 bits, cover at most
    64 keys.
    """
    v = tl.load(v_ptrs)
    half: tl.constexpr = v.dtype == tl.float16
    new_maximum = tl.maximum(maximum, tile_maximum)
    decay = tl.exp2(maximum - new_maximum)
    p = tl.exp2(
        logits * query_scale[:, None] - (new_maximum if half else new_maximum - LOG2_448)[:, None]
    )
    total = total * decay + tl.sum(p, axis=1)
    # The interpreter casts e4m3 wrongly, so it gets bytes. Both decoded operands are scaled by
    # 2^-8.
    if v.dtype == tl.uint8:
        product = tl.dot(e4m3_as_float16(e4m3_bytes(p)), tl.trans(e4m3_as_float16(v))) * 65536.0
    else:
        codes = p.to(tl.float16) if half else e4m3(p)
        product = tl.dot(codes, tl.trans(v), out_dtype=tl.float16 if HALF_SUM else tl.float32).to(
            tl.float32
        )
    return (
        result * decay[:, None] + product * tile_scales(v_scale_ptrs, tile, T, HEAD_DIM)[None, :],
        total,
        new_maximum,
    )


@triton.jit(do_not_specialize=["M", "N", "stride_qs", "stride_ks", "stride_vsd"])
def attention_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    out_ptr,
    M,
    N,
    softmax_scale,
    stride_qh,
    stride_qs,
    stride_kh,
    stride_ks,
    stride_vh,
    stride_vd,
    stride_vsh,
    stride_vsd,
    stride_out,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF_SUM: tl.constexpr,
    SCALE_COPIES: tl.constexpr,
):
    """Attend from BLOCK_M queries of one head to all keys.

    softmax_scale = log2(e) / sqrt(HEAD_DIM).
    """
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, KEY_TILE)
    row = tl.minimum(rows, M - 1)  # rows past the end read the last row; their stores are masked
    q = tl.load(q_ptr + head * stride_qh + row[:, None] * HEAD_DIM + channel[None, :])
    query_scale = tl.load(q_scale_ptr + head * stride_qs + row) * softmax_scale
    k_ptrs = k_ptr + head * stride_kh + key[None, :] * HEAD_DIM + channel[:, None]
    k_scale_ptrs = k_scale_ptr + head * stride_ks + key
    v_ptrs = v_ptr + head * stride_vh + channel[:, None].to(tl.int64) * stride_vd + key[None, :]
    v_scale_ptrs = v_scale_ptr + head * stride_vsh + channel.to(tl.int64) * stride_vsd
    result = tl.zeros((BLOCK_M, HEAD_DIM), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    T = tl.cdiv(N, KEY_TILE)
    for tile in range(0, N // KEY_TILE):
        result, total, maximum = attend_tile(
            result,
            total,
            maximum,
            q,
            query_scale,
            k_ptrs,
            k_scale_ptrs,
            v_ptrs,
            v_scale_ptrs,
            tile,
            T,
            KEY_TILE,
            HEAD_DIM,
            HALF_SUM,
            SCALE_COPIES,
            False,
        )
        k_ptrs += KEY_TILE * HEAD_DIM
        k_scale_ptrs += KEY_TILE
        v_ptrs += KEY_TILE
    left = N % KEY_TILE
    if left > 0:
        result, total, maximum = attend_tile(
            result,
            total,
            maximum,
            q,
            query_scale,
            k_ptrs,
            k_scale_ptrs,
            v_ptrs,
            v_scale_ptrs,
            T - 1,
            T,
            left,
            HEAD_DIM,
            HALF_SUM,
            SCALE_COPIES,
            True,
        )
    y = tl.div_rn(result, tl.broadcast_to(total[:, None], (BLOCK_M, HEAD_DIM)))
    out_ptrs = out_ptr + rows[:, None] * stride_out + head * HEAD_DIM + channel[None, :]
    tl.store(out_ptrs, stored(y, out_ptr.dtype.element_ty), mask=(rows < M)[:, None])


def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """Triton implementation of `attention_int8.quantize_values`; same contract."""
    num_heads, head_dim, _ = out.shape
    codes = out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out
    values_kernel[(out_scale.shape[2], num_heads)](
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
        num_warps=4,
        enable_fp_fusion=False,
    )


def attention_int8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor
) -> None:
    """Triton implementation of `attention_int8.attention_int8`; same contract.

    Integer products equal the reference's. Exponentials use the hardware's exp2, so a probability
    close to a rounding boundary may round differently.
    float16 and float8_e4m3fn values: with `AttentionTile.half_sum` the sum over a tile is rounded
    to fp16. NaN in the scales of queries or values, or in the scales of all keys of a tile, reaches
    the output; NaN in the scale of a single key may not.
    """
    num_heads, num_queries, head_dim = q.shape
    arch = architecture(q.device)
    tile = attention_tile(
        arch, next(name for name, dtype in PV_DTYPES.items() if dtype == v.dtype), head_dim
    )
    if v.dtype == torch.float8_e4m3fn and not multiplies_e4m3(arch):
        v = v.view(torch.uint8)
    attention_kernel[(triton.cdiv(num_queries, tile.block_m), num_heads)](
        q,
        q_scale,
        k,
        k_scale,
        v,
        v_scale,
        out,
        num_queries,
        k.shape[1],
        math.log2(math.e) / math.sqrt(head_dim),
        q.stride(0),
        q_scale.stride(0),
        k.stride(0),
        k_scale.stride(0),
        v.stride(0),
        v.stride(1),
        v_scale.stride(0),
        v_scale.stride(1),
        out.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_M=tile.block_m,
        HALF_SUM=tile.half_sum,
        SCALE_COPIES=scale_copies(arch),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
