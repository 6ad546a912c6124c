"""`attention_int8` on tensor cores, queries and keys in int8, probabilities and values in int8,
fp16 or e4m3; the layout of the values.
"""

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
# Its low byte is p - 128 once p was added; the sum of both rounds p half to even.
ROUND_LESS_128 = tl.constexpr(12582912.0 - 128.0)
LOG2_255 = tl.constexpr(math.log2(255.0))
LOG2_448 = tl.constexpr(math.log2(448.0))
# Triton's own cast rounds twice on sm_89, over fp16: one p in 256 would go the wrong way.
FOUR_E4M3 = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
    "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
)


# One variant for every number of tokens: these strides follow it, and some of them divide by 16.
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
    """One tile of 64 keys of one head: [64, HEAD_DIM] -> [HEAD_DIM, 64] int8, fp16 or bytes of
    e4m3, and HEAD_DIM scales.
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
    """The value scales of one tile, [HEAD_DIM]: four tiles' are read, because the compiler gives
    every thread its own copy of fewer.
    """
    near = (tile // 4) * 4 + tl.arange(0, 4)
    scales = tl.load(v_scale_ptrs[:, None] + near[None, :], mask=(near < T)[None, :], other=0.0)
    return tl.sum(tl.where((near == tile)[None, :], scales, 0.0), axis=1)


@triton.jit
def key_scales(k_scale_ptrs, COPIES: tl.constexpr):
    """The scales of 64 keys, [64], each read COPIES times."""
    if COPIES == 1:
        return tl.load(k_scale_ptrs)
    return tl.max(tl.load(k_scale_ptrs[:, None] + tl.zeros((1, COPIES), tl.int32)), axis=1)


def scale_copies(arch: str) -> int:
    """How often a step reads the scale of a key. Triton 3.6 copies 64 scales in the layout of the
    logits, sixteen times four bytes a thread; four times 64 are too many for that, and every thread
    copies one.
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
    """One online-softmax step over 64 keys; `left`: how many of them exist, where MASKED.
    query_scale: log2(e) / sqrt(HEAD_DIM) in it.
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
    # a scale is positive: the largest stays the largest
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
    """p lies in 0..255 against the tile's own maximum and is multiplied as p - 128, which fits
    int8; 128 times the sum of the values makes up for it.
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
    """fp32 as e4m3, rounded once, half to even; NVIDIA from sm_89."""
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
    """p is 1 (fp16) or 448 (e4m3) at the running maximum. Each tile's product begins at zero, so
    that neither an fp16 sum nor one of e4m3, which tensor cores keep in 14 to 22 bits, runs over
    more than 64 keys.
    """
    v = tl.load(v_ptrs)
    half: tl.constexpr = v.dtype == tl.float16
    new_maximum = tl.maximum(maximum, tile_maximum)
    decay = tl.exp2(maximum - new_maximum)
    p = tl.exp2(
        logits * query_scale[:, None] - (new_maximum if half else new_maximum - LOG2_448)[:, None]
    )
    total = total * decay + tl.sum(p, axis=1)
    # bytes of e4m3 in the interpreter, whose own casts are wrong; decoded, both are 2^-8 of their
    # value
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
    """BLOCK_M queries of one head over all keys; softmax_scale = log2(e) / sqrt(HEAD_DIM)."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, KEY_TILE)
    row = tl.minimum(rows, M - 1)  # rows past the end read the last one; their stores are masked
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
    """out = round(v^T / s), one scale per tile of 64 keys and channel: the contract of the torch
    reference.
    """
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
    """out = softmax(q k^T / sqrt(head_dim)) v over tiles of 64 keys: the contract of the torch
    reference.

    The integers are the reference's; exponentials are the hardware's exp2, so a probability next to
    a half may round the other way.
    float16 and float8_e4m3fn values: a tile's sum is rounded to fp16 where `AttentionTile.half_sum`
    says so. NaN among the scales of queries or values, or in all of a tile's keys', reaches the
    output; that of a single key need not.
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
