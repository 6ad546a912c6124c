"""Triton device functions shared by the kernels: rounding, e4m3 bytes, rotation, row stores."""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from lowvram_kernels import quantize_rows, sizes

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
BEFORE_3_7 = VERSION < (3, 7)
AFTER_3_7 = VERSION > (3, 7)
AFTER_3_8 = VERSION > (3, 8)
# 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 half to even, on every architecture and in
# the interpreter.
ROUND = tl.constexpr(12582912.0)
SMALLEST_ABSMAX_BITS = tl.constexpr(int.from_bytes(struct.pack("<f", 1e-12), "little"))
INT8_MAX = tl.constexpr(127.0)
LOW_STEPS = tl.constexpr(quantize_rows.LOW_STEPS)
FLOAT16_MAX = tl.constexpr(sizes.FLOAT16_MAX)
E4M3_MAX = tl.constexpr(448.0)
GROUP = tl.constexpr(256)


@triton.jit
def round_half_even(x):
    """Round x to an integer, half to even, as fp32; |x| < 2^22."""
    return (x + ROUND) - ROUND


@triton.jit
def rounded_product(x, y, SCALAR: tl.constexpr):
    """Return x * y in fp32 such that it is not fused with a following addition.

    SCALAR: as scalar instructions, see `scalar_products`.
    """
    if SCALAR:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return x * y


def scalar_products(arch: str) -> bool:
    """Return whether products before a sum must be emitted as scalar instructions.

    Triton 3.6 emits them in pairs (`mul.rn.f32x2`). On sm_120 its assembler splits the pairs and
    fuses the products with the sum despite their rounding mode, so that the result differs in bits
    from the reference's.
    """
    return BEFORE_3_7 and arch == "sm_120"


@triton.jit
def size_bits(x):
    """Return the bits of |x| (fp32) as int32; they have the order of |x|, with NaN the largest.

    A maximum over floats would drop NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def absmax_of_bits(bits):
    """Convert a maximum of `size_bits` to fp32, at least 1e-12; NaN stays NaN."""
    return tl.maximum(bits, SMALLEST_ABSMAX_BITS).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_bytes(x):
    """Convert fp32 x, |x| <= 448, to e4m3 bytes (uint8), rounded half to even.

    It uses bit operations, because not every architecture has the cast.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # 960 = (127 - 7) << 3: the difference of the exponent biases, above 3 bits of mantissa
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    subnormal = (tl.abs(x) * 512.0 + ROUND).to(tl.uint32, bitcast=True) & 0xFF  # multiples of 2^-9
    # 2^-6, the smallest normal
    return (sign | tl.where(size < 0x3C800000, subnormal, normal)).to(tl.uint8)


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """Convert fp32 x to DTYPE, rounded half to even; fp16 is clamped, NaN stays NaN.

    bf16 is rounded with bit operations, because the interpreter's own cast truncates.
    """
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(
            x == x, rounded, x
        )  # rounding would overflow the bits of the GPU's NaN to zero
    if tl.float16 == DTYPE:
        x = tl.clamp(x, -FLOAT16_MAX, FLOAT16_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def e4m3_as_float16(code):
    """Convert e4m3 bytes to fp16 values scaled by 2^-8, exactly; NaN is not supported.

    The exponent bits are kept, and the bias changes from 7 to 15.
    """
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _half_sum_less_self(x, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Apply (ones / 2 - identity) along one base-4 digit of the channel index.

    Sums of pairs give the reference's order of additions.
    """
    y = tl.reshape(x, (OUTER, 2, 2, INNER))
    half = tl.sum(tl.sum(y, axis=2), axis=1) * 0.5
    return tl.reshape(half[:, None, None, :] - y, x.shape)


@triton.jit
def rotate_reversed(x, GROUPS: tl.constexpr):
    """Apply `hadamard.rotate` to [GROUPS, 256], with the channels of each group in reverse order.

    H4 = (ones / 2 - identity) * flip, and flips of all four digits are a flip of the whole group.
    The flip is left to `_reversed_words`, where the data is a quarter as large.
    """
    x = _half_sum_less_self(x, GROUPS, 64)
    x = _half_sum_less_self(x, GROUPS * 4, 16)
    x = _half_sum_less_self(x, GROUPS * 16, 4)
    return _half_sum_less_self(x, GROUPS * 64, 1)


@triton.jit
def turn_heads(x, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Apply `hadamard.turn_heads` to [HEADS, HEAD_DIM]."""
    groups: tl.constexpr = HEADS * HEAD_DIM // 64
    x = _half_sum_less_self(x, groups, 16)
    x = _half_sum_less_self(x, groups * 4, 4)
    return _half_sum_less_self(x, groups * 16, 1)


@triton.jit
def _reversed_words(codes, GROUPS: tl.constexpr):
    """Pack [GROUPS, 256] bytes into [GROUPS, 64] little-endian words, reversed in each group."""
    place = (24 - 8 * tl.arange(0, 4)).to(tl.uint32)
    quads = (
        tl.reshape(codes.to(tl.uint8, bitcast=True).to(tl.uint32), (GROUPS, 64, 4))
        << place[None, None, :]
    )
    return tl.flip(tl.sum(quads, axis=2).to(tl.int32, bitcast=True), 1)


@triton.jit
def quantized_codes(x, scale, E4M3: tl.constexpr):
    """Return round(x / scale) as int8, or as e4m3 bytes if E4M3."""
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if E4M3:
        codes = e4m3_bytes(tl.minimum(tl.maximum(scaled, -E4M3_MAX), E4M3_MAX))
    else:
        codes = tl.minimum(tl.maximum(round_half_even(scaled), -INT8_MAX), INT8_MAX).to(tl.int8)
    return codes


@triton.jit
def store_codes(codes, out_ptr, row, stride_out, K, GROUPS: tl.constexpr, ROTATED: tl.constexpr):
    """Store one row of codes [GROUPS, 256]; the arguments are those of `store_row`."""
    if ROTATED:
        words = tl.arange(0, GROUPS)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(
            out_ptr + row * stride_out + words, _reversed_words(codes, GROUPS), mask=words * 4 < K
        )
    else:
        channels = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(out_ptr + row * stride_out + channels, codes, mask=channels < K)


@triton.jit
def store_row(
    x,
    out_ptr,
    out_scale_ptr,
    low_ptr,
    low_scale_ptr,
    row,
    stride_out,
    K,
    GROUPS: tl.constexpr,
    ROTATED: tl.constexpr,
    E4M3: tl.constexpr,
    LOW: tl.constexpr,
):
    """Quantize one row: out[row] = round(x / s), out_scale[row] = s = absmax / 127 (e4m3: / 448).

    s is NaN if x contains NaN. x: [GROUPS, 256] fp32, zero past K; row: int64. out has int32 words
    if ROTATED (K is then a multiple of 256), else bytes; `stride_out` is in these units. LOW: also
    store the second code and its scale, see `quantize_rows.store_quantized`.
    """
    if ROTATED:
        x = rotate_reversed(x, GROUPS)
    absmax = absmax_of_bits(tl.max(tl.max(size_bits(x), axis=1), axis=0))
    scale = tl.div_rn(absmax, E4M3_MAX if E4M3 else INT8_MAX)
    tl.store(out_scale_ptr + row, scale)
    codes = quantized_codes(x, scale, E4M3)
    store_codes(codes, out_ptr, row, stride_out, K, GROUPS, ROTATED)
    if LOW:
        lost = tl.div_rn(x, tl.broadcast_to(scale, x.shape)) - codes.to(tl.float32)
        low = tl.minimum(tl.maximum(round_half_even(lost * LOW_STEPS), -INT8_MAX), INT8_MAX)
        store_codes(low.to(tl.int8), low_ptr, row, stride_out, K, GROUPS, ROTATED)
        tl.store(low_scale_ptr + row, tl.div_rn(scale, LOW_STEPS))
