"""Int8 weights per row: `scale = max|row| / 127`, `q = round(w / scale)`, with or without rotation
of the inputs.
"""

from __future__ import annotations

import torch
from optimum.quanto import qint8
from torch import Tensor

from lowvram_quantize.rows import ErrorSums, RowEngine, RowFormat, quantize_rows


def _round_(quotients: Tensor) -> None:
    """Half to even; -128 is left out, so that the range is symmetric."""
    quotients.round_().clamp_(-qint8.qmax, qint8.qmax)


INT8 = RowFormat(qint8, rotated=True, round_=_round_)
INT8_PLAIN = RowFormat(qint8, rotated=False, round_=_round_)


def quantize_int8(
    weight: Tensor, engine: RowEngine, rotated: bool = True
) -> tuple[Tensor, Tensor, ErrorSums]:
    """`W·R ≈ q * scale`: q [N, K] int8 in -127 .. 127, scale [N, 1] fp32, in fp32 arithmetic; K a
    multiple of 256 where rotated.
    """
    return quantize_rows(engine, weight, INT8 if rotated else INT8_PLAIN)


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """`q * scale` [N, K] fp32: of the rotated weight where it was rotated."""
    return codes.to(torch.float32) * scales
