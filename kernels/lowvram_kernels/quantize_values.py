"""Op `quantize_values`: the values of attention, quantized per tile of keys and channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.dispatch import op
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.quantize_rows import INT8_MAX, SMALLEST_ABSMAX
from lowvram_kernels.sizes import KEY_TILE, row_slices

# Largest stored value of a tile and channel, per dtype. For e4m3 the sum over a tile fits fp16, in
# which GeForce cards accumulate at twice the rate: 64 * 448 * 2.25 = 64,512 (kernels 2.3).
VALUE_MAX = {torch.int8: INT8_MAX, torch.float16: 1.0, torch.float8_e4m3fn: 2.25}
# What the Triton kernel subtracts from the offset of int8 values: the number at which it starts its
# sums, so that they need no conversion.
SUM_START = 12582912


@op(constraints.quantize_values)
def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """Quantize and transpose the values, with one scale per channel and tile of 64 keys.

    out = round(v^T / s), s = absmax / VALUE_MAX.
    v: [M, H * head_dim] float; its first row is the first key of a tile. out: [H, head_dim, T * 64]
    int8, float16 or float8_e4m3fn, T = ceil(M / 64), zero past M; keys are contiguous, the operand
    layout of the tensor cores. out_scale: [H, T, head_dim, 2] float32: s, and the offset that
    attention adds to its products: for int8 s (128 * sum of the tile's codes - `SUM_START`), else
    0. A tile's are contiguous.
    Per-tile scales need no second pass over the keys and keep bf16 values within fp16's range.
    Raises `UnsupportedOpError` if `out` has the wrong number of columns or an unsupported dtype.
    """
    num_heads, head_dim, padded = out.shape
    if padded % KEY_TILE or not padded - KEY_TILE < v.shape[0] <= padded:
        tiles = math.ceil(v.shape[0] / KEY_TILE)
        raise UnsupportedOpError(
            f"values of {v.shape[0]} keys need {tiles} tiles of {KEY_TILE}, got {padded} columns"
        )
    largest = value_max(out)
    for rows in row_slices(v.shape[0]):  # every slice but the last holds complete tiles
        heads = v[rows].float().t().reshape(num_heads, head_dim, -1)
        heads = torch.nn.functional.pad(heads, (0, -heads.shape[-1] % KEY_TILE))
        tiles = heads.unflatten(-1, (-1, KEY_TILE))  # [H, head_dim, T, 64]
        scale = tiles.abs().amax(dim=-1).clamp_(min=SMALLEST_ABSMAX) / largest
        first, last = rows.start // KEY_TILE, rows.start // KEY_TILE + scale.shape[-1]
        scaled = tiles / scale.unsqueeze(-1)
        codes = (scaled.round_() if out.dtype == torch.int8 else scaled).clamp_(-largest, largest)
        out[:, :, first * KEY_TILE : last * KEY_TILE] = codes.flatten(-2)
        out_scale[:, first:last, :, 0] = scale.transpose(1, 2)
        offset = torch.zeros_like(scale)
        if out.dtype == torch.int8:
            offset = (128 * codes.sum(dim=-1) - SUM_START) * scale
        out_scale[:, first:last, :, 1] = offset.transpose(1, 2)


def value_max(v: Tensor) -> float:
    """Return `VALUE_MAX` for the dtype of v; raise `UnsupportedOpError` for any other dtype."""
    if v.dtype not in VALUE_MAX:
        raise UnsupportedOpError(f"values are {' or '.join(map(str, VALUE_MAX))}, not {v.dtype}")
    return VALUE_MAX[v.dtype]
