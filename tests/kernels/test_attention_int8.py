"""The reference of `attention_int8` against exact attention (promise 18)."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_kernels.attention_int8 import attention_int8
from lowvram_kernels.quantize_values import quantize_values
from lowvram_kernels.rms_rope_quantize import rms_rope, rms_rope_quantize
from lowvram_kernels.tuning import PV_DTYPES

from lowvram.models.rope import RopeTable
from tests.kernels import cases
from tests.kernels.inputs import poisoned, random


def attention_inputs(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return q, k, v for two heads of 128; keys have a common bias that smoothing removes."""
    q, k, v = (
        random(m, 256, seed=seed),
        random(n, 256, seed=seed + 1),
        random(n, 256, seed=seed + 2),
    )
    k[:, ::32] += 15
    return q, k, v


def run_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, smoothing: torch.Tensor | None
) -> torch.Tensor:
    m, n, heads = q.shape[0], k.shape[0], 2
    tiles = math.ceil(n / 64)
    ones = torch.ones(256)
    q8, qs = poisoned((heads, m, 128), torch.int8), poisoned((heads, m), torch.float32)
    k8, ks = poisoned((heads, n, 128), torch.int8), poisoned((heads, n), torch.float32)
    v8, vs = (
        poisoned((heads, 128, tiles * 64), torch.int8),
        poisoned((heads, tiles, 128, 2), torch.float32),
    )
    rms_rope_quantize(q, ones, None, None, None, q8, qs, eps=0.0)
    rms_rope_quantize(k, ones, None, None, smoothing, k8, ks, eps=0.0)
    quantize_values(v, v8, vs)
    out = poisoned((m, 256), torch.float32)
    attention_int8(q8, qs, k8, ks, v8, vs, out)
    return out


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(256)
    queries, keys = (rms_rope(x, ones, None, None, num_heads=2, eps=0.0).double() for x in (q, k))
    values = v.double().view(-1, 2, 128).transpose(0, 1)
    out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    return out.transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (33, 65), (100, 200), (64, 1000)])
def test_int8_attention_is_close_to_exact_attention(m: int, n: int) -> None:
    """Relative RMSE of at most 0.8 % for keys with outlier channels, smoothed by their mean."""
    q, k, v = attention_inputs(m, n)
    smoothing = rms_rope(k, torch.ones(256), None, None, num_heads=2, eps=0.0).mean(1)
    expected = exact_attention(q, k, v)
    error = (run_attention(q, k, v, smoothing).double() - expected).norm() / expected.norm()
    assert error <= 0.008


def test_a_query_depends_on_no_other_query() -> None:
    q, k, v = attention_inputs(100, 130)
    whole = run_attention(q, k, v, None)
    for start, end in ((0, 1), (1, 64), (3, 18), (64, 100)):
        assert torch.equal(run_attention(q[start:end], k, v, None), whole[start:end])


def test_smoothing_helps() -> None:
    q, k, v = attention_inputs(64, 300)
    smoothing = rms_rope(k, torch.ones(256), None, None, num_heads=2, eps=0.0).mean(1)
    expected = exact_attention(q, k, v)
    smoothed, plain = (
        float((run_attention(q, k, v, s).double() - expected).norm()) for s in (smoothing, None)
    )
    assert smoothed < plain


@pytest.mark.parametrize(
    ("pv", "largest"), [("int8", 0.008), ("fp16", 0.008), ("bf16", 0.008), ("fp8", 0.045)]
)
def test_attention_of_a_long_clip_with_outlier_channels(pv: str, largest: float) -> None:
    """All ops in the order in which a block calls them: 4,096 keys, four heads of 128."""
    ops = cases.AttentionOps(rms_rope_quantize, quantize_values, attention_int8)
    assert cases.attention_error(ops, 128, 4096, 4, dtype=PV_DTYPES[pv]) <= largest


@pytest.mark.parametrize("rope", [True, False])
def test_attention_of_harder_data(rope: bool) -> None:
    """Two cases with larger errors.

    RoPE rotates the bias of the keys differently per token, so smoothing removes less of it.
    Channels of v that are 20 times as large dominate the error.
    """
    turned = (
        RopeTable((4, 32, 32), 128, torch.device("cpu")).at(torch.arange(4096)) if rope else None
    )
    ops = cases.AttentionOps(rms_rope_quantize, quantize_values, attention_int8)
    error = cases.attention_error(
        ops, 128, 4096, 4, dtype=torch.int8, rope=turned, value_outliers=1.0 if rope else 20.0
    )
    assert error <= (0.010 if rope else 0.009)


@pytest.mark.parametrize("pv", ["fp16", "fp8", "bf16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_query_depends_on_no_other_query_in_a_float_product(pv: str, threads: int) -> None:
    case = cases.attention(100, 130, 2, pv=pv)
    whole, before = case.run("reference")["out"], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for start, end in ((0, 1), (1, 64), (3, 18), (64, 100)):
            part = {name: case.inputs[name][:, start:end] for name in ("q", "q_scale")}
            out = poisoned((end - start, 256), torch.float32)
            attention_int8(**(case.inputs | part), out=out)
            assert torch.equal(out, whole[start:end])
    finally:
        torch.set_num_threads(before)
