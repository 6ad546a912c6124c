"""Quantize weights to int8 with one scale per row, optionally after the Hadamard rotation.

`scale = max|row| / 127`, `q = round(w / scale)`.
"""

from __future__ import annotations

import torch
from optimum.quanto import qint8
from torch import Tensor

from lowvram_quantize.rows import ErrorSums, RowEngine, RowFormat, quantize_rows


def _round_(quotients: Tensor) -> None:
    """Round half to even and clamp to ±127; -128 is unused, so that the range is symmetric."""
    quotients.round_().clamp_(-qint8.qmax, qint8.qmax)


INT8 = RowFormat(qint8, rotated=True, round_=_round_)
INT8_PLAIN = RowFormat(qint8, rotated=False, round_=_round_)


def quantize_int8(
    weight: Tensor, engine: RowEngine, rotated: bool = True
) -> tuple[Tensor, Tensor, ErrorSums]:
    """Quantize a weight [N, K] to int8: `W·R ≈ q * scale`, or `W ≈ q * scale` if not `rotated`.

    Returns q [N, K] int8 in -127 .. 127, scale [N, 1] fp32, and the error, computed in fp32. With
    `rotated` K must be a multiple of 256.
    """
    return quantize_rows(engine, weight, INT8 if rotated else INT8_PLAIN)


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return `q * scale`, [N, K] fp32; for a rotated weight the result is still rotated."""
    return codes.to(torch.float32) * scales
