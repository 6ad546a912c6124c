"""Faults for the calls of `lowvram_kernels.cases`, and the error of attention against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lowvram_kernels.cases import (
    E4M3,
    Case,
    Inputs,
    Output,
    attention,
    codes,
    difference,
    linear,
    linear_add,
    linear_gelu,
    ordered,
    random,
    rms_rope,
    rows,
    values,
)
from lowvram_kernels.rms_rope_quantize import rms_rope as rms_rope_exact
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import values_of
from torch import Tensor

__all__ = [
    "E4M3",
    "Case",
    "Inputs",
    "Output",
    "attention",
    "codes",
    "difference",
    "linear",
    "linear_add",
    "linear_gelu",
    "ordered",
    "random",
    "rms_rope",
    "rows",
    "values",
]


def rolled(name: str, dim: int = 0) -> Callable[[Inputs], Inputs]:
    """Return a fault that rolls an input by one along `dim`."""
    return lambda inputs: inputs | {name: inputs[name].roll(1, dim).contiguous()}


def rolled_bytes(name: str, dim: int) -> Callable[[Inputs], Inputs]:
    """Return the same fault for a dtype that torch does not roll (e4m3)."""

    def roll(inputs: Inputs) -> Inputs:
        tensor = inputs[name]
        if tensor.dtype != E4M3:
            return rolled(name, dim)(inputs)
        return inputs | {name: tensor.view(torch.uint8).roll(1, dim).contiguous().view(E4M3)}

    return roll


def changed(**values: Any) -> Callable[[Inputs], Inputs]:
    """Return a fault that replaces arguments."""
    return lambda inputs: inputs | values


class AttentionOps(NamedTuple):
    """The ops of one backend that a block calls for attention."""

    rms_rope_quantize: Callable[..., None]
    quantize_values: Callable[..., None]
    attention: Callable[..., None]


def attention_error(
    ops: AttentionOps,
    m: int,
    n: int,
    heads: int,
    *,
    dtype: torch.dtype,
    smoothed: bool = True,
    value_outliers: float = 1.0,
    rope: tuple[Tensor, Tensor] | None = None,
    device: str = "cpu",
) -> float:
    """Return the relative RMSE of attention against fp64, for random q, k, v in bf16.

    m queries, n keys, heads of 128, RMSNorm as in the model; dtype: of the stored values.
    Outliers as in kernels 2.8: four channels of each head of k are shifted by 15; every 48th
    channel of v is `value_outliers` times as large. Smoothing is the mean of at most 256 evenly
    spaced keys, as in the model. rope: (cos, sin), each [max(m, n), 64].
    """
    dim, tiles = heads * 128, math.ceil(n / 64)
    q, k, v = (random(rows, dim, seed=seed, device=device) for seed, rows in enumerate((m, n, n)))
    k[:, ::32] += 15
    v[:, ::48] *= value_outliers
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    ones = torch.ones(dim, device=device)
    q_turn, k_turn = (
        (None, None) if rope is None else (rope[0][:rows], rope[1][:rows]) for rows in (m, n)
    )
    exact_q, exact_k = (
        rms_rope_exact(x, ones, *turn, num_heads=heads, eps=1e-6)
        for x, turn in ((q, q_turn), (k, k_turn))
    )
    count = min(n, 256)
    smoothing = (
        exact_k[:, torch.arange(count, device=device) * n // count].mean(1) if smoothed else None
    )
    q8, k8 = (torch.empty(heads, rows, 128, dtype=torch.int8, device=device) for rows in (m, n))
    qs, ks = (torch.empty(heads, rows, device=device) for rows in (m, n))
    v8, vs = v, None
    if STORED_VALUES[values_of(dtype)].scaled:
        v8 = torch.empty(heads, 128, tiles * 64, dtype=dtype, device=device)
        vs = torch.empty(heads, tiles, 128, 2, device=device)
    ops.rms_rope_quantize(q, ones, *q_turn, None, q8, qs, eps=1e-6)
    ops.rms_rope_quantize(k, ones, *k_turn, smoothing, k8, ks, eps=1e-6)
    if vs is not None:
        ops.quantize_values(v, v8, vs)
    out = torch.full((m, dim), float("nan"), device=device)
    ops.attention(q8, qs, k8, ks, v8, vs, out)
    weights = torch.softmax(
        exact_q.double() @ exact_k.double().transpose(1, 2) / math.sqrt(128), dim=-1
    )
    expected = (weights @ v.double().view(n, heads, 128).transpose(0, 1)).transpose(0, 1).flatten(1)
    return float((out.double() - expected).norm() / expected.norm())
