"""Quantize weights to fp8 (e4m3fn) with one scale per row.

`scale = max|row| / 448`, `q = fp8(w / scale)`.
"""

from __future__ import annotations

from optimum.quanto import qfloat8_e4m3fn
from torch import Tensor

from lowvram_quantize.rows import ErrorSums, RowEngine, RowFormat, quantize_rows


def _saturate_(quotients: Tensor) -> None:
    """Clamp to ±448, the largest e4m3 value; the cast would turn larger quotients into NaN.

    The cast itself rounds half to even.
    """
    quotients.clamp_(-qfloat8_e4m3fn.qmax, qfloat8_e4m3fn.qmax)


FP8 = RowFormat(qfloat8_e4m3fn, rotated=False, round_=_saturate_)


def quantize_fp8(weight: Tensor, engine: RowEngine) -> tuple[Tensor, Tensor, ErrorSums]:
    """Quantize a weight [N, K] to fp8: `W ≈ q * scale`.

    Returns q [N, K] float8_e4m3fn, scale [N, 1] fp32, and the error. torch does the rounding,
    because compiled Triton misrounds to e4m3 on some GPUs.
    """
    return quantize_rows(engine, weight, FP8)
