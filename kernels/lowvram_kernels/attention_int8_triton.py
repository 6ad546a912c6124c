"""Triton kernel of `attention_int8`: online softmax on tensor cores."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels import sizes
from lowvram_kernels.common_triton import (
    AFTER_3_8,
    BEFORE_3_7,
    e4m3_as_float16,
    e4m3_bytes,
    stored,
)
from lowvram_kernels.tuning import (
    INTERPRETER,
    AttentionTile,
    architecture,
    attention_tile,
    multiplies_e4m3,
    values_of,
)

KEY_TILE = tl.constexpr(sizes.KEY_TILE)
# An int32 sum that starts at the bits of 1.5 * 2^23 is, read as fp32, 1.5 * 2^23 plus the sum, for
# sums below 2^22: it needs no conversion. A tile's sum is below 64 * 128 * 127 < 2^20.
START_BITS = tl.constexpr(0x4B400000)
# 1.5 * 2^23 - 128: adding it to p rounds p half to even and leaves p - 128 in the low byte.
ROUND_LESS_128 = tl.constexpr(12582912.0 - 128.0)
ROUND_LESS_128_BITS = tl.constexpr(0x4B400000 - 128)
LOG2_255 = tl.constexpr(math.log2(255.0))
LOG2_448 = tl.constexpr(math.log2(448.0))
# A tile's maximum may lie this far below the row's, in powers of two, before its probabilities are
# computed relative to the row's. The sums so far grow by at most 2^64, far within fp32.
LARGEST_DROP = tl.constexpr(64.0)
# Triton's own cast goes through fp16 on sm_89 and rounds twice, which misrounds one p in 256.
FOUR_E4M3 = tl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
    "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
)


@triton.jit
def key_order(PERMUTED: tl.constexpr, KEYS: tl.constexpr):
    """Return which key each column of the logits is, [KEYS].

    PERMUTED: such that each thread's four consecutive probabilities, in the layout of the first
    product, are four consecutive keys of the int8 operand of the second (`in_key_order`).
    """
    column = tl.arange(0, KEYS)
    if PERMUTED:
        return (column & 240) | ((column & 6) << 1) | ((column & 8) >> 2) | (column & 1)
    return column


@triton.jit
def in_key_order(codes):
    """Return [M, 64] codes in the order of the keys, from the order of `key_order`."""
    rows: tl.constexpr = codes.shape[0]
    columns = tl.permute(tl.reshape(codes, (rows, 4, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(columns, (rows, KEY_TILE))


@triton.jit
def key_scales(k_scale_ptrs, COPIES: tl.constexpr):
    """Load the scales of the keys of one step, each COPIES times (see `scale_copies`)."""
    if COPIES == 1:
        return tl.load(k_scale_ptrs)
    return tl.max(tl.load(k_scale_ptrs[:, None] + tl.zeros((1, COPIES), tl.int32)), axis=1)


@triton.jit
def tile_logits(
    q,
    k_ptrs,
    k_scale_ptrs,
    left,
    PERMUTED: tl.constexpr,
    SCALE_COPIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return q k^T times the scales of the keys, [M, KEYS] fp32; columns in `key_order`.

    MASKED: only the first `left` keys exist; others are -inf.
    """
    KEYS: tl.constexpr = k_ptrs.shape[1]
    key = key_order(PERMUTED, KEYS)
    if MASKED:
        k = tl.load(k_ptrs, mask=(key < left)[None, :], other=0)
        key_scale = tl.load(k_scale_ptrs, mask=tl.arange(0, KEYS) < left, other=0.0)
    else:
        k = tl.load(k_ptrs)
        key_scale = key_scales(k_scale_ptrs, SCALE_COPIES)
    if PERMUTED:
        places = tl.permute(tl.reshape(key_scale, (KEYS // 16, 4, 2, 2)), (0, 2, 1, 3))
        key_scale = tl.reshape(places, (KEYS,))
    logits = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * key_scale[None, :]
    if MASKED:
        logits = tl.where((key < left)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def split_channels(scales, HEAD_DIM: tl.constexpr):
    """Split pairs [HEAD_DIM, 2] into those of the lower and of the upper half of the channels."""
    halves = tl.reshape(scales, (2, HEAD_DIM // 2, 2))
    return tl.split(tl.permute(halves, (1, 2, 0)))


@triton.jit
def add_int8(result, decay, codes, v_ptrs, scales):
    """Return result * decay + (codes + 128) v for half of the channels; scales: [HALF, 2]."""
    shape: tl.constexpr = result.shape
    start = tl.full(shape, START_BITS, tl.int32)
    product = tl.dot(codes, tl.trans(tl.load(v_ptrs)), start, out_dtype=tl.int32)
    scale, offset = tl.split(scales)
    values = tl.fma(
        product.to(tl.float32, bitcast=True),
        tl.broadcast_to(scale[None, :], shape),
        tl.broadcast_to(offset[None, :], shape),
    )
    return tl.fma(result, tl.broadcast_to(decay[:, None], shape), values)


@triton.jit
def e4m3(p):
    """Convert fp32 to e4m3 with one rounding, half to even; NVIDIA sm_89 or later."""
    codes = tl.inline_asm_elementwise(
        FOUR_E4M3, "=r,r,r,r,r", [p], dtype=tl.uint8, is_pure=True, pack=4
    )
    return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit
def probabilities(p, DTYPE: tl.constexpr):
    """Round p to the dtype of the values, as the operand of the second product.

    The interpreter casts e4m3 wrongly, so it gets bytes, decoded to 2^-8 of their value.
    """
    if tl.uint8 == DTYPE:
        return e4m3_as_float16(e4m3_bytes(p))
    if tl.float8e4nv == DTYPE:
        return e4m3(p)
    return p.to(DTYPE)


@triton.jit
def add_float(result, decay, codes, v_ptrs, scales, HALF_SUM: tl.constexpr, WIDE: tl.constexpr):
    """Return result * decay + codes v for half of the channels; scales: [HALF, 2].

    The product of each tile starts at zero, so that sums in fp16, or of e4m3 products, for which
    tensor cores keep 14 to 22 bits, cover at most 64 keys. WIDE: as in `attention_kernel`.
    """
    v = tl.load(v_ptrs)
    if v.dtype == tl.uint8:
        v = e4m3_as_float16(v)
        if WIDE:
            product = tl.dot(codes.to(tl.float64), tl.trans(v.to(tl.float64))).to(tl.float32)
        else:
            product = tl.dot(codes, tl.trans(v))
        product = product * 65536.0
    else:
        product = tl.dot(codes, tl.trans(v), out_dtype=tl.float16 if HALF_SUM else tl.float32)
        product = product.to(tl.float32)
    scale, _ = tl.split(scales)
    return result * decay[:, None] + product * scale[None, :]


@triton.jit
def add_plain(
    result, decay, p, v_ptrs, left, PERMUTED: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr
):
    """Return result * decay + p v; v as the model computed it, its keys in `key_order`.

    WIDE: as in `attention_kernel`.
    """
    if MASKED:
        key = key_order(PERMUTED, v_ptrs.shape[0])
        v = tl.load(v_ptrs, mask=(key < left)[:, None], other=0.0)
    else:
        v = tl.load(v_ptrs)
    if WIDE:
        product = tl.dot(stored(p, v.dtype).to(tl.float64), v.to(tl.float64)).to(tl.float32)
        return result * decay[:, None] + product
    return tl.dot(p.to(v.dtype), v, result * decay[:, None])


@triton.jit
def attend(
    low,
    high,
    total,
    base,
    maximum,
    q,
    query_scale,
    k_ptrs,
    k_scale_ptrs,
    v_ptrs,
    v_high_ptrs,
    v_scale_ptrs,
    left,
    SCALED: tl.constexpr,
    HALF_SUM: tl.constexpr,
    PERMUTED: tl.constexpr,
    SCALE_COPIES: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Run one online-softmax step and return the new (low, high, total, base, maximum).

    low, high: sums of p v, of one half of the channels each, or low of all where not SCALED. total:
    sum of p. All are relative to 2^base, or with float values to 2^maximum. maximum: of the row's
    logits so far, for int8 less `LARGEST_DROP`. int8: p is in 0..255 relative to the maximum of
    these keys; the product uses p - 128, which fits int8, and the offset adds 128 times the sum of
    the values. Float values: p is 1 (fp16, bf16) or 448 (e4m3) at the running maximum.
    """
    DTYPE: tl.constexpr = v_ptrs.dtype.element_ty
    INT8: tl.constexpr = tl.int8 == DTYPE
    logits = tile_logits(q, k_ptrs, k_scale_ptrs, left, PERMUTED, SCALE_COPIES, MASKED)
    # query_scale is positive, so scaling after the maximum gives the same maximum.
    tile_maximum = tl.max(logits, axis=1) * query_scale
    if INT8:
        new_base = tl.maximum(tile_maximum, maximum, propagate_nan=tl.PropagateNan.ALL)
        p = tl.exp2(logits * query_scale[:, None] - (new_base - LOG2_255)[:, None])
        bits = (p + ROUND_LESS_128).to(tl.int32, bitcast=True)
        decay = tl.exp2(base - new_base)
        codes = bits.to(tl.int8)
        if PERMUTED:
            codes = in_key_order(codes)
        if not PERMUTED:
            tl.debug_barrier()  # RDNA's compiler would load the scales earlier, and spill them
        low_scales, high_scales = split_channels(tl.load(v_scale_ptrs), q.shape[1])
        low = add_int8(low, decay, codes, v_ptrs, low_scales)
        high = add_int8(high, decay, codes, v_high_ptrs, high_scales)
        # After the products: before them the sum costs registers.
        p_sum = tl.sum(bits - ROUND_LESS_128_BITS, axis=1).to(tl.float32)
        total = total * decay + p_sum
        base = new_base
        maximum = tl.maximum(maximum, tile_maximum - LARGEST_DROP)
    else:
        new_maximum = tl.maximum(maximum, tile_maximum, propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp2(maximum - new_maximum)
        half: tl.constexpr = DTYPE.primitive_bitwidth == 16
        top = new_maximum if half else new_maximum - LOG2_448
        p = tl.exp2(logits * query_scale[:, None] - top[:, None])
        total = total * decay + tl.sum(p, axis=1)
        if SCALED:
            codes = probabilities(p, DTYPE)
            low_scales, high_scales = split_channels(tl.load(v_scale_ptrs), q.shape[1])
            low = add_float(low, decay, codes, v_ptrs, low_scales, HALF_SUM, WIDE)
            high = add_float(high, decay, codes, v_high_ptrs, high_scales, HALF_SUM, WIDE)
        else:
            low = add_plain(low, decay, p, v_ptrs, left, PERMUTED, WIDE, MASKED)
        maximum = new_maximum
    return low, high, total, base, maximum


@triton.jit(do_not_specialize=["M", "N", "stride_qs"])
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
    stride_vst,
    stride_out,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    HALF_SUM: tl.constexpr,
    PERMUTED: tl.constexpr,
    SCALE_COPIES: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_LOOP: tl.constexpr,
):
    """Attend from BLOCK_M queries of one head to all keys, KEYS of them a step.

    softmax_scale = log2(e) / sqrt(HEAD_DIM). SCALED: values as stored by `quantize_values`, whose
    strides are those of heads and channels; otherwise of heads and keys. SCALED values are
    accumulated in two halves of the channels: one product then needs half of the registers. STAGES:
    of the loop's copies; named on the loop, because Triton otherwise copies only operands of
    products ahead, and not the scales of the values. WIDE: float products in fp64, for the
    interpreter: its bf16 products are wrong, and a row's fp32 sums depend on its place in a block.
    ONE_LOOP: see `one_loop`.
    """
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    height = tl.minimum(M - first, BLOCK_M).to(tl.int32)
    rows = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, HEAD_DIM)
    WIDTH: tl.constexpr = HEAD_DIM // 2 if SCALED else HEAD_DIM
    half = tl.arange(0, WIDTH)
    column = tl.arange(0, KEYS)
    key = key_order(PERMUTED, KEYS)
    row = tl.minimum(rows, height - 1)  # rows past the end read the last; their stores are masked
    q_ptrs = q_ptr + head * stride_qh + first * HEAD_DIM + row[:, None] * HEAD_DIM
    q = tl.load(q_ptrs + channel[None, :])
    query_scale = tl.load(q_scale_ptr + head * stride_qs + first + row) * softmax_scale
    k_ptr += head * stride_kh
    k_place = key[None, :] * HEAD_DIM + channel[:, None]
    k_scale_ptr += head * stride_ks
    v_ptr += head * stride_vh
    v_scale_ptr += head * stride_vsh
    # Places within a step are 32 bits, and only the start of a step is a pointer.
    if SCALED:
        v_step = KEYS
        v_place = half[:, None] * stride_vd + column[None, :]
        v_high_ptr = v_ptr + WIDTH * stride_vd.to(tl.int64)
    else:
        v_step = KEYS * stride_vd.to(tl.int64)
        v_place = key[:, None] * stride_vd + half[None, :]
        v_high_ptr = v_ptr
    part = channel[:, None] * 2 + tl.arange(0, 2)[None, :]
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    low = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    high = low if SCALED else total
    base = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    maximum = base
    steps = tl.cdiv(N, KEYS) if ONE_LOOP else N // KEYS
    for step in tl.range(0, steps, num_stages=STAGES):
        low, high, total, base, maximum = attend(
            low,
            high,
            total,
            base,
            maximum,
            q,
            query_scale,
            k_ptr + step * (KEYS * HEAD_DIM) + k_place,
            k_scale_ptr + step * KEYS + column,
            v_ptr + step * v_step + v_place,
            v_high_ptr + step * v_step + v_place,
            v_scale_ptr + step * stride_vst + part,
            N - step * KEYS,
            SCALED,
            HALF_SUM,
            PERMUTED,
            SCALE_COPIES,
            WIDE,
            ONE_LOOP,
        )
    left = 0 if ONE_LOOP else N % KEYS
    if left > 0:
        low, high, total, base, maximum = attend(
            low,
            high,
            total,
            base,
            maximum,
            q,
            query_scale,
            k_ptr + steps * (KEYS * HEAD_DIM) + k_place,
            k_scale_ptr + steps * KEYS + column,
            v_ptr + steps * v_step + v_place,
            v_high_ptr + steps * v_step + v_place,
            v_scale_ptr + steps * stride_vst + part,
            left,
            SCALED,
            HALF_SUM,
            PERMUTED,
            SCALE_COPIES,
            WIDE,
            True,
        )
    share = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), total)[:, None]
    out_ptrs = out_ptr + first * stride_out + head * HEAD_DIM
    out_ptrs += rows.to(tl.int64)[:, None] * stride_out
    out_ptrs += half[None, :]
    mask = (rows < height)[:, None]
    tl.store(out_ptrs, stored(low * share, out_ptr.dtype.element_ty), mask=mask)
    if SCALED:
        tl.store(out_ptrs + WIDTH, stored(high * share, out_ptr.dtype.element_ty), mask=mask)


def permuted(arch: str, pv: str) -> bool:
    """Return whether attention takes the keys in `key_order`: it fits NVIDIA's layouts.

    Values in fp16 or e4m3 are stored in the order of the keys, and their products take more keys.
    """
    return pv in ("int8", "bf16") and not arch.startswith("gfx")


def scale_copies(arch: str, pv: str) -> int:
    """Return how many copies of each key scale one step loads.

    Triton 3.6 loads the scales of keys in the layout of the logits, which is four bytes at a time
    where the keys are not permuted. Four times as many do not fit that layout, and each thread
    copies one.
    """
    return 4 if BEFORE_3_7 and arch.startswith("sm_") and not permuted(arch, pv) else 1


def one_loop(arch: str, pv: str) -> bool:
    """Return whether every step of attention is masked, and not only the last one.

    Without a second copy of the step, RDNA's compiler of Triton 3.7 and later spills no registers;
    that of 3.6 spills none with it, with int8 values.
    """
    return arch.startswith("gfx") and (pv == "fp16" or not BEFORE_3_7)


def tile_of(arch: str, pv: str, head_dim: int) -> AttentionTile:
    """Return `attention_tile`; the assembler of Triton 3.9 spills at another limit."""
    tile = attention_tile(arch, pv, head_dim)
    return tile._replace(registers=236) if AFTER_3_8 and tile.registers == 240 else tile


def attention_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Triton implementation of `attention_int8.attention_int8`; same contract.

    Integer products equal the reference's. Exponentials use the hardware's exp2, so a probability
    close to a rounding boundary may round differently; int8: a product and its offset are added
    with one rounding, relative to 1.5 * 2^23 steps of the values.
    float16 and float8_e4m3fn values: with `AttentionTile.half_sum` the sum over a tile is rounded
    to fp16. NaN in the scales of queries or values, or in the scales of all keys of a tile, reaches
    the output; NaN in the scale of a single key may not.
    """
    num_heads, num_queries, head_dim = q.shape
    arch = architecture(q.device)
    pv = values_of(v.dtype)
    tile = tile_of(arch, pv, head_dim)
    if v.dtype == torch.float8_e4m3fn and not multiplies_e4m3(arch):
        v = v.view(torch.uint8)
    options = {} if tile.registers is None else {"maxnreg": tile.registers}
    attention_kernel[(triton.cdiv(num_queries, tile.block_m), num_heads)](
        q,
        q_scale,
        k,
        k_scale,
        v,
        k_scale if v_scale is None else v_scale,
        out,
        num_queries,
        k.shape[1],
        math.log2(math.e) / math.sqrt(head_dim),
        q.stride(0),
        q_scale.stride(0),
        k.stride(0),
        k_scale.stride(0),
        v.stride(0) if v_scale is not None else head_dim,
        v.stride(1) if v_scale is not None else v.stride(0),
        0 if v_scale is None else v_scale.stride(0),
        0 if v_scale is None else v_scale.stride(1),
        out.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_M=tile.block_m,
        KEYS=tile.keys,
        STAGES=tile.stages,
        SCALED=v_scale is not None,
        HALF_SUM=tile.half_sum,
        PERMUTED=permuted(arch, pv),
        SCALE_COPIES=scale_copies(arch, pv),
        WIDE=arch == INTERPRETER,
        ONE_LOOP=one_loop(arch, pv),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
        **options,
    )
