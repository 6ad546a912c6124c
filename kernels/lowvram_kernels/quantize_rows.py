"""Ops `quantize_rows` and `gelu_quantize`: dynamic quantization of activations per row."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.dispatch import op
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.hadamard import rotate
from lowvram_kernels.sizes import FLOAT16_MAX, row_slices

INT8_MAX = 127.0
# The second code of a value counts in 1 / 254 of the first one's scale: what the first has lost is
# at most half a scale.
LOW_STEPS = 254.0
E4M3_MAX = 448.0
# Lower bound of absmax, so that the codes of a row of zeros are zero, not NaN.
SMALLEST_ABSMAX = 1e-12
# Polynomial for 2^r on [-1/2, 1/2], constant term first; relative error 7.5e-8.
EXP2 = (
    1.0000001192092896,
    0.6931469440460205,
    0.24022120237350464,
    0.05550713092088699,
    0.009675540961325169,
    0.001327647129073739,
)
GELU_EXPONENT = -2.302208198144325  # -2 log2(e) sqrt(2 / pi)


def store_quantized(
    rows: Tensor,
    out: Tensor,
    out_scale: Tensor,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Quantize rows symmetrically: out = round(rows / s), out_scale = s.

    s = absmax(row) / 127 for int8, / 448 for e4m3. rows: [M, K] float32, rotated first if
    `rotated`; out: [M, K] int8 or float8_e4m3fn; out_scale: [M, 1] float32. Rounds half to even.
    low, low_scale: like out and out_scale, int8; a second code for what the first has lost, so that
    rows = out * out_scale + low * low_scale with an error of at most s / 508.
    Raises `UnsupportedOpError` for another dtype of `out`.
    """
    if rotated:
        rows = rotate(rows)
    absmax = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_ABSMAX)
    if out.dtype == torch.int8:
        out_scale.copy_(absmax / INT8_MAX)
        scaled = rows / out_scale
        codes = scaled.round().clamp_(-INT8_MAX, INT8_MAX)
        out.copy_(codes)
        if low is not None and low_scale is not None:
            low.copy_(scaled.sub_(codes).mul_(LOW_STEPS).round_().clamp_(-INT8_MAX, INT8_MAX))
            low_scale.copy_(out_scale / LOW_STEPS)
    elif out.dtype == torch.float8_e4m3fn:
        out_scale.copy_(absmax / E4M3_MAX)
        out.copy_((rows / out_scale).clamp_(-E4M3_MAX, E4M3_MAX))
    else:
        raise UnsupportedOpError(
            f"activations are quantized to int8 or float8_e4m3fn, not {out.dtype}"
        )


def store(x: Tensor, out: Tensor) -> None:
    """Round x to the dtype of `out`, half to even; float16 is clamped, and NaN stays NaN.

    x: float32, of the shape of `out`; it may be changed.
    """
    if out.dtype == torch.float16:
        x = x.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    out.copy_(x)


def slices_of(rows: slice, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return these rows of tensors that may be absent."""
    return tuple(None if tensor is None else tensor[rows] for tensor in tensors)


@op(constraints.quantize_rows)
def quantize_rows(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Compute out, out_scale = quantize(x) with one symmetric scale per row.

    x: [M, K] float; out: [M, K] int8 or float8_e4m3fn; out_scale: [M, 1] float32. `rotated`: apply
    the Hadamard rotation before quantizing; K must be a multiple of 256. low, low_scale: a second
    int8 code, see `store_quantized`. Arithmetic is fp32.
    """
    for rows in row_slices(*x.shape):
        store_quantized(
            x[rows].float(),
            out[rows],
            out_scale[rows],
            rotated,
            *slices_of(rows, low, low_scale),
        )


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU; x: float32, |x| < 1e30.

    0.5 x (1 + tanh(u)) = x / (1 + 2^t), t = -2 log2(e) u, u = sqrt(2/pi) (x + 0.044715 x^3).
    2^t is computed as 2^round(t), by adding to the exponent bits, times a polynomial in
    t - round(t). Every operation is a multiplication, addition or division with one rounding, so a
    kernel that computes in the same order gives the same bits; library `exp` and `tanh` do not
    guarantee that.
    """
    t = ((x + 0.044715 * (x * x * x)) * GELU_EXPONENT).clamp_(-126.0, 126.0)
    whole = t.round()
    r = t - whole
    power = r * EXP2[5]
    for coefficient in EXP2[4:0:-1]:
        power = power.add_(coefficient).mul_(r)
    power += EXP2[0]
    power.view(torch.int32).add_(whole.to(torch.int32) * 2**23)
    return x / (power + 1.0)


@op(constraints.quantize_rows)
def gelu_quantize(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Compute out, out_scale = quantize(GELU_tanh(x)), the input of ffn.2.

    Shapes, dtypes, rounding and second code as in `quantize_rows`.
    """
    for rows in row_slices(*x.shape):
        store_quantized(
            gelu_tanh(x[rows].float()),
            out[rows],
            out_scale[rows],
            rotated,
            *slices_of(rows, low, low_scale),
        )
