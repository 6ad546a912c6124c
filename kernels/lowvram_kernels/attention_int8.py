"""Ops `attention_int8` and `quantize_values`: attention with int8 queries and keys.

Probabilities and values are multiplied in int8, fp16 or fp8, by the dtype in which the values are
stored (kernels 2.1, 2.3, 2.5, 2.8, 2.9).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.dispatch import op
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.quantize_rows import INT8_MAX, SMALLEST_ABSMAX
from lowvram_kernels.sizes import KEY_TILE, PLAIN_KEY_TILE, REFERENCE_ROWS, row_slices

# Largest stored value of a tile and channel, and largest probability, per dtype of the second
# product. For e4m3 the sum over one tile fits fp16, in which GeForce cards accumulate at twice the
# rate: 64 * 448 * 2.25 = 64,512 (kernels 2.3).
VALUE_MAX = {torch.int8: INT8_MAX, torch.float16: 1.0, torch.float8_e4m3fn: 2.25}
P_MAX = {
    torch.int8: 255.0,
    torch.float16: 1.0,
    torch.float8_e4m3fn: 448.0,
    torch.bfloat16: 1.0,
}
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


@op(constraints.attention_int8)
def attention_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Compute out = softmax(q k^T / sqrt(head_dim)) v over tiles of keys in ascending order.

    q: [H, M, head_dim] int8, q_scale: [H, M] float32; k: [H, N, head_dim] int8, k_scale: [H, N]
    float32; v, v_scale: as stored by `quantize_values` in tiles of 64 keys, or v [N, H * head_dim]
    bfloat16 without scales, in tiles of 128; out: [M, H * head_dim] float32 or bfloat16.
    The dtype of v is the dtype of the product of probabilities and values. The running maximum, sum
    and output are fp32. The Triton kernel supports head_dim 64 and 128, and reads k_scale fastest
    if its rows begin on 64 bytes.

    int8: both products are exact integers. Probabilities are rounded to 0..255 relative to the row
    maximum of their own tile; the softmax denominator is the sum of the rounded values.
    float16, bfloat16, float8_e4m3fn: probabilities are rounded to that dtype and are 1 or 448 at
    the running maximum. The denominator is the sum of the unrounded values. With scales, the
    product of each tile is accumulated separately, then added to the fp32 output. Rounding to e4m3
    contributes a relative error of 0.035 on random data.

    The result of a query does not depend on the other queries of the call. For that the reference
    uses `exp`, because torch's CPU `exp2` rounds the last elements of an array differently, and
    sums that are exact or accumulated in fp64.
    Raises `UnsupportedOpError` if v has the wrong number of columns or an unsupported dtype.
    """
    num_heads, num_keys, head_dim = k.shape
    if v_scale is None:
        _check_plain_values(v, num_keys)
        values = v.unflatten(-1, (num_heads, head_dim)).permute(1, 2, 0)  # [H, head_dim, N]
    else:
        if v.shape[-1] != math.ceil(num_keys / KEY_TILE) * KEY_TILE:
            raise UnsupportedOpError(
                f"{num_keys} keys need {math.ceil(num_keys / KEY_TILE) * KEY_TILE} value columns, "
                f"got {v.shape[-1]}"
            )
        value_max(v)
        values = v
    per_head = out.unflatten(-1, (num_heads, head_dim)).transpose(0, 1)
    for rows in row_slices(q.shape[1]):
        for heads in row_slices(num_heads, REFERENCE_ROWS * head_dim):
            scale = None if v_scale is None else v_scale[heads, :, :, 0]
            queries, keys = (q[heads, rows], q_scale[heads, rows]), (k[heads], k_scale[heads])
            _attend(*queries, *keys, values[heads], scale, per_head[heads, rows])


def _check_plain_values(v: Tensor, num_keys: int) -> None:
    """Raise `UnsupportedOpError` if v cannot be values without scales."""
    if v.dtype != torch.bfloat16:
        raise UnsupportedOpError(f"{v.dtype} values need scales: only torch.bfloat16 has none")
    if v.shape[0] != num_keys:
        raise UnsupportedOpError(f"{num_keys} keys need as many rows of values, got {v.shape[0]}")


def _attend(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Run `attention_int8` on a slice of queries and heads.

    v: [heads, head_dim, keys], v_scale: [heads, tiles, head_dim]; out: [heads, queries, head_dim].
    """
    num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[1]
    size = PLAIN_KEY_TILE if v_scale is None else KEY_TILE
    query_scale = (q_scale / math.sqrt(head_dim)).unsqueeze(-1)  # [H, M, 1]
    queries = q.float()
    maximum = q_scale.new_full((num_heads, num_queries, 1), -math.inf)
    total = torch.zeros_like(maximum)
    result = q_scale.new_zeros(num_heads, num_queries, head_dim)
    for tile in range(math.ceil(num_keys / size)):
        keys = slice(tile * size, min((tile + 1) * size, num_keys))
        # A sum of at most 256 int8 products is below 2^24, so the fp32 product is exact.
        logits = (
            (queries @ k[:, keys].float().transpose(1, 2))
            * query_scale
            * k_scale[:, keys].unsqueeze(1)
        )
        tile_maximum = logits.amax(dim=-1, keepdim=True)
        new_maximum = torch.maximum(maximum, tile_maximum)
        base = tile_maximum if v.dtype == torch.int8 else new_maximum
        p = (logits - base).exp() * P_MAX[v.dtype]
        values = v[:, :, keys].transpose(1, 2)
        product, p_sum = _int8_sums(p, values) if v.dtype == torch.int8 else _float_sums(p, values)
        if v_scale is not None:
            product = product * v_scale[:, tile].unsqueeze(1)
        decay, weight = (maximum - new_maximum).exp(), (base - new_maximum).exp()
        total = total * decay + p_sum * weight
        result = result * decay + product * weight
        maximum = new_maximum
    out.copy_(result / total)


def _int8_sums(p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (p @ values, sum of p) for p rounded to 0..255: integers below 2^24, exact in fp32."""
    p = p.round_()
    return p @ values.float(), p.sum(dim=-1, keepdim=True)


def _float_sums(p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (p @ values, sum of p); only the product uses p rounded to the dtype of values.

    Accumulated in fp64, so that the fp32 results do not depend on the order of additions.
    """
    product = p.to(values.dtype).double() @ values.double()
    return product.float(), p.double().sum(dim=-1, keepdim=True).float()
