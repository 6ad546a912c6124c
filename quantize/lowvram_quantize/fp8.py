"""Fp8 weights (e4m3fn) per row: `scale = max|row| / 448`, `q = fp8(w / scale)`."""

from __future__ import annotations

from optimum.quanto import qfloat8_e4m3fn
from torch import Tensor

from lowvram_quantize.rows import ErrorSums, RowEngine, RowFormat, quantize_rows


def _saturate_(quotients: Tensor) -> None:
    """448 is the largest; without this a quotient rounded up would become NaN. The cast itself
    rounds half to even.
    """
    quotients.clamp_(-qfloat8_e4m3fn.qmax, qfloat8_e4m3fn.qmax)


FP8 = RowFormat(qfloat8_e4m3fn, rotated=False, round_=_saturate_)


def quantize_fp8(weight: Tensor, engine: RowEngine) -> tuple[Tensor, Tensor, ErrorSums]:
    """`W ≈ q * scale`: q [N, K] float8_e4m3fn, scale [N, 1] fp32. Rounded by torch: compiled Triton
    misrounds to e4m3 on some GPUs.
    """
    return quantize_rows(engine, weight, FP8)
