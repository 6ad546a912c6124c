"""Op `attention_int8`: attention with int8 queries and keys.

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
from lowvram_kernels.quantize_rows import store
from lowvram_kernels.quantize_values import value_max
from lowvram_kernels.sizes import KEY_TILE, PLAIN_KEY_TILE, REFERENCE_ROWS, row_slices

# The largest probability, per dtype of the second product.
P_MAX = {
    torch.int8: 255.0,
    torch.float16: 1.0,
    torch.float8_e4m3fn: 448.0,
    torch.bfloat16: 1.0,
}


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
    bfloat16 without scales, in tiles of 128; out: [M, H * head_dim] float32, bfloat16 or float16
    (clamped).
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
    store(result / total, out)


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
