"""Linears outside the quantized blocks: embeddings, projections and the head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lowvram_kernels.sizes import row_slices
from torch import Tensor

# Fixed rows per product: libraries choose a GEMM by shape, and each one rounds differently.
FIXED_ROWS = 256


def fixed_rows_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, prepare: Callable[[Tensor], Tensor]
) -> None:
    """out = prepare(x) W^T + b, in tiles of exactly `FIXED_ROWS` rows, the last padded with zeros.

    x: [M, *], input of `prepare`, which works row by row and returns [m, K] in the weight's dtype;
    weight: [N, K]; bias: [N]; out: [M, N].
    """
    for start in range(0, x.shape[0], FIXED_ROWS):
        rows = prepare(x[start : start + FIXED_ROWS])
        padded = F.pad(rows, (0, 0, 0, FIXED_ROWS - rows.shape[0]))
        out[start : start + FIXED_ROWS] = F.linear(padded, weight, bias)[: rows.shape[0]]


def dequantized(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight * scale in fp32, rounded once to `dtype`; a weight without a scale is cast.

    weight: [N, K]; scale: [N, 1] float32. Fp32 temporaries have `REFERENCE_ROWS` rows.
    """
    if scale is None:
        return weight.to(dtype)
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_slices(weight.shape[0]):
        result[rows] = weight[rows].float() * scale[rows]
    return result
