"""Attention with both products in int8 (kernels 2.5, 2.8, 2.9), and the layout of its values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram.errors import UnsupportedError
from lowvram_kernels.quantize_rows import INT8_MAX, SMALLEST_ABSMAX
from lowvram_kernels.slices import row_slices

KEY_TILE = 64
P_MAX = 255.0


def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> None:
    """out = round(v^T / s), one scale s per tile of 64 keys and channel.

    v: [M, H * head_dim] float, its first row the first key of a tile; out: [H, head_dim, T * 64] int8, T = ceil(M / 64), zero past M;
    out_scale: [H, head_dim, T] float32. The scale belongs to the tile, so no second pass over the keys is needed.
    """
    num_heads, head_dim, padded = out.shape
    if padded % KEY_TILE or not padded - KEY_TILE < v.shape[0] <= padded:
        tiles = math.ceil(v.shape[0] / KEY_TILE)
        raise UnsupportedError(f"values of {v.shape[0]} keys need {tiles} tiles of {KEY_TILE}, got {padded} columns")
    for rows in row_slices(v.shape[0]):  # whole tiles, but for the last
        heads = v[rows].float().t().reshape(num_heads, head_dim, -1)
        heads = torch.nn.functional.pad(heads, (0, -heads.shape[-1] % KEY_TILE))
        tiles = heads.unflatten(-1, (-1, KEY_TILE))  # [H, head_dim, T, 64]
        scale = tiles.abs().amax(dim=-1).clamp_(min=SMALLEST_ABSMAX) / INT8_MAX
        first, last = rows.start // KEY_TILE, rows.start // KEY_TILE + scale.shape[-1]
        codes = (tiles / scale.unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
        out[:, :, first * KEY_TILE : last * KEY_TILE] = codes.flatten(-2)
        out_scale[:, :, first:last] = scale


def attention_int8(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor) -> None:
    """out = softmax(q k^T / sqrt(head_dim)) v, over tiles of 64 keys in ascending order.

    q: [H, M, head_dim] int8, q_scale: [H, M] float32; k: [H, N, head_dim] int8, k_scale: [H, N] float32;
    v: [H, head_dim, ceil(N / 64) * 64] int8, v_scale: [H, head_dim, ceil(N / 64)] float32; out: [M, H * head_dim] float32 or bfloat16.
    Both products are exact integers; probabilities are rounded to 0..255 against the row maximum of their own tile, and
    the sum they are divided by is the sum of those rounded values. The running maximum, sum and output are fp32.
    A query's result depends on no other query: on a CPU that takes `exp`, because torch's `exp2` rounds the last elements of an
    array unlike the others.
    """
    num_keys = k.shape[1]
    if v.shape[-1] != math.ceil(num_keys / KEY_TILE) * KEY_TILE:
        raise UnsupportedError(f"{num_keys} keys need {math.ceil(num_keys / KEY_TILE) * KEY_TILE} value columns, got {v.shape[-1]}")
    for rows in row_slices(q.shape[1]):
        _attend(q[:, rows], q_scale[:, rows], k, k_scale, v, v_scale, out[rows])


def _attend(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor) -> None:
    """`attention_int8` of a few queries: its temporaries are as many fp32 rows."""
    num_heads, num_queries, head_dim = q.shape
    num_keys = k.shape[1]
    query_scale = (q_scale / math.sqrt(head_dim)).unsqueeze(-1)  # [H, M, 1]
    queries = q.float()
    maximum = q_scale.new_full((num_heads, num_queries, 1), -math.inf)
    total = torch.zeros_like(maximum)
    result = q_scale.new_zeros(num_heads, num_queries, head_dim)
    for tile in range(v.shape[-1] // KEY_TILE):
        keys = slice(tile * KEY_TILE, min((tile + 1) * KEY_TILE, num_keys))
        # Sums of at most 256 products of int8 stay below 2^24, so the fp32 product is the exact integer.
        logits = (queries @ k[:, keys].float().transpose(1, 2)) * query_scale * k_scale[:, keys].unsqueeze(1)
        tile_maximum = logits.amax(dim=-1, keepdim=True)
        p = ((logits - tile_maximum).exp() * P_MAX).round_()
        values = v[:, :, tile * KEY_TILE : tile * KEY_TILE + p.shape[-1]].float()
        product = (p @ values.transpose(1, 2)) * v_scale[:, :, tile].unsqueeze(1)
        new_maximum = torch.maximum(maximum, tile_maximum)
        decay, weight = (maximum - new_maximum).exp(), (tile_maximum - new_maximum).exp()
        total = total * decay + p.sum(dim=-1, keepdim=True) * weight
        result = result * decay + product * weight
        maximum = new_maximum
    out.copy_((result / total).transpose(0, 1).reshape(num_queries, num_heads * head_dim))
