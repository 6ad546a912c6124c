"""Device functions that several kernels share: rounding, e4m3 as bytes, the Hadamard butterfly,
stores of whole rows.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

BEFORE_3_7 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
# 1.5 * 2^23: adding it to |x| < 2^22 and taking it away rounds half to even, on every architecture
# and in the interpreter.
ROUND = tl.constexpr(12582912.0)
SMALLEST_ABSMAX_BITS = tl.constexpr(int.from_bytes(struct.pack("<f", 1e-12), "little"))
INT8_MAX = tl.constexpr(127.0)
E4M3_MAX = tl.constexpr(448.0)
GROUP = tl.constexpr(256)


@triton.jit
def round_half_even(x):
    """The integer nearest to x, as fp32; |x| < 2^22."""
    return (x + ROUND) - ROUND


@triton.jit
def rounded_product(x, y, SCALAR: tl.constexpr):
    """x * y, fp32, rounded before anything is added to it. SCALAR: one by one, see
    `scalar_products`.
    """
    if SCALAR:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return x * y


def scalar_products(arch: str) -> bool:
    """Whether products before a sum must be kept out of pairs: Triton 3.6 pairs them
    (`mul.rn.f32x2`), and the assembler that comes with it splits the pairs and fuses them with the
    sum on sm_120, in spite of their rounding. A fused sum has other bits than the reference's.
    """
    return BEFORE_3_7 and arch == "sm_120"


@triton.jit
def size_bits(x):
    """The bits of |x|, fp32, as int32: they order as the sizes do, with a NaN above all, which a
    maximum of floats would drop.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def absmax_of_bits(bits):
    """The largest of `size_bits` as fp32, 1e-12 at least; NaN stays NaN."""
    return tl.maximum(bits, SMALLEST_ABSMAX_BITS).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_bytes(x):
    """The e4m3 code of fp32 x, |x| <= 448, rounded half to even, as uint8: by bits, because not
    every architecture casts.
    """
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # exponent bias 127 - 7, above 3 bits of mantissa
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    subnormal = (tl.abs(x) * 512.0 + ROUND).to(tl.uint32, bitcast=True) & 0xFF  # multiples of 2^-9
    # 2^-6, the smallest normal
    return (sign | tl.where(size < 0x3C800000, subnormal, normal)).to(tl.uint8)


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """fp32 x as DTYPE, rounded half to even by bits for bf16: the interpreter's own cast truncates.
    NaN stays NaN.
    """
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # the bits of the GPU's NaN would run over into a zero
    return x.to(DTYPE)


@triton.jit
def e4m3_as_float16(code):
    """e4m3 bytes * 2^-8 as fp16, exactly: its exponent field is the same bits under a bias of 15
    instead of 7. No NaN.
    """
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _half_sum_less_self(x, OUTER: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr):
    """(ones / 2 - identity) along one base-4 digit of the channel; sums of two, so that their order
    is the reference's.
    """
    y = tl.reshape(x, (OUTER, 2, 2, INNER))
    half = tl.sum(tl.sum(y, axis=2), axis=1) * 0.5
    return tl.reshape(half[:, None, None, :] - y, (GROUPS, GROUP))


@triton.jit
def rotate_reversed(x, GROUPS: tl.constexpr):
    """`hadamard.rotate` of [GROUPS, 256] with each group's channels in reverse order.

    H4 = (ones / 2 - identity) times the flip, and flips of all four digits are the flip of the
    whole group: it waits until the values are bytes, which are four times cheaper to move.
    """
    x = _half_sum_less_self(x, GROUPS, 64, GROUPS)
    x = _half_sum_less_self(x, GROUPS * 4, 16, GROUPS)
    x = _half_sum_less_self(x, GROUPS * 16, 4, GROUPS)
    return _half_sum_less_self(x, GROUPS * 64, 1, GROUPS)


@triton.jit
def _reversed_words(codes, GROUPS: tl.constexpr):
    """[GROUPS, 256] bytes -> [GROUPS, 64] little-endian words of the same bytes in reverse order
    within each group.
    """
    place = (24 - 8 * tl.arange(0, 4)).to(tl.uint32)
    quads = (
        tl.reshape(codes.to(tl.uint8, bitcast=True).to(tl.uint32), (GROUPS, 64, 4))
        << place[None, None, :]
    )
    return tl.flip(tl.sum(quads, axis=2).to(tl.int32, bitcast=True), 1)


@triton.jit
def quantized_codes(x, scale, E4M3: tl.constexpr):
    """round(x / scale) as int8, or as the bytes of e4m3."""
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if E4M3:
        codes = e4m3_bytes(tl.minimum(tl.maximum(scaled, -E4M3_MAX), E4M3_MAX))
    else:
        codes = tl.minimum(tl.maximum(round_half_even(scaled), -INT8_MAX), INT8_MAX).to(tl.int8)
    return codes


@triton.jit
def store_row(
    x,
    out_ptr,
    out_scale_ptr,
    row,
    stride_out,
    K,
    GROUPS: tl.constexpr,
    ROTATED: tl.constexpr,
    E4M3: tl.constexpr,
):
    """out[row] = round(x / s), out_scale[row] = s = absmax / 127 or / 448, NaN where x holds one.

    x: [GROUPS, 256] fp32, zero past K; row: int64. out is int32 words where ROTATED (K is a
    multiple of 256 then) and bytes elsewhere; `stride_out` counts those.
    """
    if ROTATED:
        x = rotate_reversed(x, GROUPS)
    absmax = absmax_of_bits(tl.max(tl.max(size_bits(x), axis=1), axis=0))
    scale = tl.div_rn(absmax, E4M3_MAX if E4M3 else INT8_MAX)
    tl.store(out_scale_ptr + row, scale)
    codes = quantized_codes(x, scale, E4M3)
    if ROTATED:
        words = tl.arange(0, GROUPS)[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(
            out_ptr + row * stride_out + words, _reversed_words(codes, GROUPS), mask=words * 4 < K
        )
    else:
        channels = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(out_ptr + row * stride_out + channels, codes, mask=channels < K)
