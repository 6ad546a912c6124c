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
from lowvram_kernels.sizes import KEY_TILE, REFERENCE_ROWS, row_slices

# Largest stored value of a tile and channel, and largest probability, per dtype of the second
# product. For e4m3 the sum over one tile fits fp16, in which GeForce cards accumulate at twice the
# rate: 64 * 448 * 2.25 = 64,512 (kernels 2.3).
VALUE_MAX = {torch.int8: INT8_MAX, torch.float16: 1.0, torch.float8_e4m3fn: 2.25}
P_MAX = {torch.int8: 255.0, torch.float16: 1.0, torch.float8_e4m3fn: 448.0}


@op(constraints.quantize_values)
def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """Quantize and transpose the values, with one scale per channel and tile of 64 keys.

    out = round(v^T / s), s = absmax / VALUE_MAX.
    v: [M, H * head_dim] float; its first row is the first key of a tile. out_scale:
    [H, head_dim, T] float32, T = ceil(M / 64). out: [H, head_dim, T * 64] int8, float16 or
    float8_e4m3fn, zero past M; keys are contiguous, the operand layout of the tensor cores.
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
        out_scale[:, :, first:last] = scale


def value_max(v: Tensor) -> float:
    """Return `VALUE_MAX` for the dtype of v; raise `UnsupportedOpError` for any other dtype."""
    if v.dtype not in VALUE_MAX:
        raise UnsupportedOpError(f"values are {' or '.join(map(str, VALUE_MAX))}, not {v.dtype}")
    return VALUE_MAX[v.dtype]


@op(constraints.attention_int8)
def attention_int8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor
) -> None:
    """Compute out = softmax(q k^T / sqrt(head_dim)) v over tiles of 64 keys in ascending order.

    q: [H, M, head_dim] int8, q_scale: [H, M] float32; k: [H, N, head_dim] int8, k_scale: [H, N]
    float32; v, v_scale: as stored by `quantize_values`; out: [M, H * head_dim] float32 or bfloat16.
    The dtype of v is the dtype of the product of probabilities and values. The running maximum, sum
    and output are fp32. The Triton kernel supports head_dim 64 and 128.

    int8: both products are exact integers. Probabilities are rounded to 0..255 relative to the row
    maximum of their own tile; the softmax denominator is the sum of the rounded values.
    float16, float8_e4m3fn: probabilities are rounded to that dtype and are 1 or 448 at the running
    maximum. The denominator is the sum of the unrounded values. The product of each tile is
    accumulated separately, then added to the fp32 output. Rounding to e4m3 contributes a relative
    error of 0.035 on random data.

    The result of a query does not depend on the other queries of the call. For that the reference
    uses `exp`, because torch's CPU `exp2` rounds the last elements of an array differently, and
    sums that are exact or accumulated in fp64.
    Raises `UnsupportedOpError` if v has the wrong number of columns or an unsupported dtype.
    """
    num_keys = k.shape[1]
    if v.shape[-1] != math.ceil(num_keys / KEY_TILE) * KEY_TILE:
        raise UnsupportedOpError(
            f"{num_keys} keys need {math.ceil(num_keys / KEY_TILE) * KEY_TILE} value columns, "
            f"got {v.shape[-1]}"
        )
    value_max(v)
    num_heads, _, head_dim = q.shape
    per_head = out.unflatten(-1, (num_heads, head_dim)).transpose(0, 1)
    for rows in row_slices(q.shape[1]):
        for heads in row_slices(num_heads, REFERENCE_ROWS * head_dim):
            queries, keys, values = (
                (q[heads, rows], q_scale[heads, rows]),
                (k[heads], k_scale[heads]),
                (v[heads], v_scale[heads]),
            )
            _attend(*queries, *keys, *values, per_head[heads, rows])


def _attend(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor
) -> None:
    """Run `attention_int8` on a slice of queries and heads; out: [heads, queries, head_dim]."""
    num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[1]
    query_scale = (q_scale / math.sqrt(head_dim)).unsqueeze(-1)  # [H, M, 1]
    queries = q.float()
    maximum = q_scale.new_full((num_heads, num_queries, 1), -math.inf)
    total = torch.zeros_like(maximum)
    result = q_scale.new_zeros(num_heads, num_queries, head_dim)
    for tile in range(v.shape[-1] // KEY_TILE):
        keys = slice(tile * KEY_TILE, min((tile + 1) * KEY_TILE, num_keys))
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
        values = v[:, :, tile * KEY_TILE : tile * KEY_TILE + p.shape[-1]].transpose(1, 2)
        product, p_sum = _int8_sums(p, values) if v.dtype == torch.int8 else _float_sums(p, values)
        decay, weight = (maximum - new_maximum).exp(), (base - new_maximum).exp()
        total = total * decay + p_sum * weight
        result = result * decay + product * v_scale[:, :, tile].unsqueeze(1) * weight
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
