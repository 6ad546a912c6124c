"""Attention with the product of queries and keys in int8, that with the values in int8, fp16 or fp8
(kernels 2.1, 2.3, 2.5, 2.8, 2.9).
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

# The largest value of a tile and channel, and the largest probability, by the dtype that both are
# multiplied in. A tile's sum stays within fp16 where cards sum it there at twice the rate: 64 * 448
# * 2.25 = 64,512 (kernels 2.3).
VALUE_MAX = {torch.int8: INT8_MAX, torch.float16: 1.0, torch.float8_e4m3fn: 2.25}
P_MAX = {torch.int8: 255.0, torch.float16: 1.0, torch.float8_e4m3fn: 448.0}


@op(constraints.quantize_values)
def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """out = round(v^T / s), one scale s = absmax / VALUE_MAX per tile of 64 keys and channel.

    v: [M, H * head_dim] float, its first row the first key of a tile; out_scale: [H, head_dim, T]
    float32, T = ceil(M / 64);
    out: [H, head_dim, T * 64] int8, float16 or float8_e4m3fn, zero past M: keys lie side by side,
    as tensor cores read them in all three. The scale belongs to the tile, so no second pass over
    the keys is needed and no value of a bf16 model overflows fp16.
    """
    num_heads, head_dim, padded = out.shape
    if padded % KEY_TILE or not padded - KEY_TILE < v.shape[0] <= padded:
        tiles = math.ceil(v.shape[0] / KEY_TILE)
        raise UnsupportedOpError(
            f"values of {v.shape[0]} keys need {tiles} tiles of {KEY_TILE}, got {padded} columns"
        )
    largest = value_max(out)
    for rows in row_slices(v.shape[0]):  # whole tiles, but for the last
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
    """`VALUE_MAX` of stored values. Raises `UnsupportedOpError` for another dtype."""
    if v.dtype not in VALUE_MAX:
        raise UnsupportedOpError(f"values are {' or '.join(map(str, VALUE_MAX))}, not {v.dtype}")
    return VALUE_MAX[v.dtype]


@op(constraints.attention_int8)
def attention_int8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor
) -> None:
    """out = softmax(q k^T / sqrt(head_dim)) v, over tiles of 64 keys in ascending order; the dtype
    of v is that of the second product.

    q: [H, M, head_dim] int8, q_scale: [H, M] float32; k: [H, N, head_dim] int8, k_scale: [H, N]
    float32; out: [M, H * head_dim] float32 or bfloat16; v, v_scale: as `quantize_values` stores
    them. The Triton kernel takes heads of 64 and 128 channels.
    int8: both products are exact integers; probabilities are rounded to 0..255 against the row
    maximum of their own tile, and the sum they are divided by is the sum of those rounded values.
    float16, float8_e4m3fn: probabilities are rounded to that dtype, 1 or 448 at the running
    maximum; the sum they are divided by is that of the unrounded ones; the product of a tile is
    summed by itself, then added to the fp32 output. The running maximum, sum and output are fp32.
    Of the error on random data, e4m3 alone makes 0.035. A query's result depends on no other query:
    on a CPU that takes `exp`, because torch's `exp2` rounds the last elements of an array unlike
    the others, and sums that no order of additions changes.
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
    """`attention_int8` of a few queries and heads, whose output of each head is a matrix: its
    temporaries are as many fp32 rows.
    """
    num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[1]
    query_scale = (q_scale / math.sqrt(head_dim)).unsqueeze(-1)  # [H, M, 1]
    queries = q.float()
    maximum = q_scale.new_full((num_heads, num_queries, 1), -math.inf)
    total = torch.zeros_like(maximum)
    result = q_scale.new_zeros(num_heads, num_queries, head_dim)
    for tile in range(v.shape[-1] // KEY_TILE):
        keys = slice(tile * KEY_TILE, min((tile + 1) * KEY_TILE, num_keys))
        # Sums of at most 256 products of int8 stay below 2^24, so the fp32 product is the exact
        # integer.
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
    """(p values, sum of p) of p rounded to 0..255: integers below 2^24, exact in fp32."""
    p = p.round_()
    return p @ values.float(), p.sum(dim=-1, keepdim=True)


def _float_sums(p: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(p values, sum of p), p rounded to the dtype of values in the product alone; fp64 hides the
    order of additions from fp32.
    """
    product = p.to(values.dtype).double() @ values.double()
    return product.float(), p.double().sum(dim=-1, keepdim=True).float()
