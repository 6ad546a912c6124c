"""Tests each op's torch reference against an independent formula (promise 18).

Outputs are poisoned, shapes are ragged and inputs strided.
"""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_kernels import dispatch
from lowvram_kernels.adaln_quantize import adaln_quantize
from lowvram_kernels.attention_int8 import VALUE_MAX, attention_int8, quantize_values
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.hadamard import rotate
from lowvram_kernels.quantize_rows import gelu_quantize, gelu_tanh, quantize_rows
from lowvram_kernels.quantized_linear import quantized_linear
from lowvram_kernels.rms_rope_quantize import rms_rope, rms_rope_quantize
from lowvram_kernels.tuning import PV_DTYPES
from lowvram_quantize.rotate import rotate as rotate_weights

from lowvram.models.rope import RopeTable
from tests.kernels import cases

RAGGED = [1, 33, 100]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an output that shows unwritten elements: NaN, or 0x5A for integers and fp8."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, 0x5A, dtype=torch.uint8).view(dtype)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., ::128] *= 30
    return x


def dense_rotation() -> torch.Tensor:
    h4 = (
        torch.tensor(
            [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64
        )
        / 2
    )
    r = h4
    for _ in range(3):
        r = torch.kron(r, h4)
    return r


def test_rotation_is_the_dense_hadamard_and_its_own_inverse() -> None:
    x = random(7, 512)
    dense = (x.double().view(7, 2, 256) @ dense_rotation()).view(7, 512)
    assert torch.allclose(rotate(x).double(), dense, atol=1e-5)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)
    with pytest.raises(UnsupportedOpError, match="multiple of 256"):
        rotate(random(2, 100))


def test_activations_and_weights_are_rotated_alike() -> None:
    x = random(5, 768)
    assert torch.allclose(rotate(x), rotate_weights(x.clone()), atol=1e-6)


@pytest.mark.parametrize("rows", RAGGED)
@pytest.mark.parametrize(
    ("dtype", "largest", "error"), [(torch.int8, 127, 0.5), (torch.float8_e4m3fn, 448, 16)]
)
def test_rows_are_quantized_to_half_a_step(
    rows: int, dtype: torch.dtype, largest: int, error: float
) -> None:
    x = with_outliers(random(rows, 512))[:, ::2]  # not contiguous
    out, scale = poisoned((rows, 256), dtype), poisoned((rows, 1), torch.float32)
    quantize_rows(x, out, scale, rotated=False)
    assert torch.allclose(scale, x.abs().amax(1, keepdim=True) / largest)
    assert ((out.float() * scale - x).abs() <= scale * error * 1.001).all()


def test_a_zero_row_has_a_finite_scale() -> None:
    out, scale = poisoned((2, 256), torch.int8), poisoned((2, 1), torch.float32)
    quantize_rows(torch.zeros(2, 256), out, scale, rotated=True)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert (out == 0).all()


def test_rotation_makes_outliers_harmless() -> None:
    """With outlier channels the error of the rotated product is at most a third."""
    x, w = with_outliers(random(64, 512)), random(128, 512, seed=1)
    exact = x.double() @ w.double().t()

    def error(rotated: bool) -> float:
        a, a_scale = poisoned((64, 512), torch.int8), poisoned((64, 1), torch.float32)
        quantize_rows(x, a, a_scale, rotated=rotated)
        turned = rotate(w) if rotated else w
        w_scale = turned.abs().amax(1, keepdim=True) / 127
        out = poisoned((64, 128), torch.float32)
        quantized_linear(a, a_scale, (turned / w_scale).round().to(torch.int8), w_scale, None, out)
        return float((out.double() - exact).norm() / exact.norm())

    assert error(True) < 0.02
    assert error(True) * 3 < error(False)


@pytest.mark.parametrize("rows", RAGGED)
def test_adaln_quantize_is_layer_norm_and_modulation(rows: int) -> None:
    x, scale, shift = random(rows, 256), random(256, seed=1), random(256, seed=2)
    out, out_scale = poisoned((rows, 256), torch.int8), poisoned((rows, 1), torch.float32)
    adaln_quantize(x, scale, shift, out, out_scale, eps=1e-6, rotated=True)
    wide = x.double()
    normed = (wide - wide.mean(1, keepdim=True)) / (
        wide.var(1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    expected = (normed * scale + shift) @ dense_rotation()
    assert ((out.double() * out_scale - expected).abs() <= out_scale * 0.51).all()


def test_gelu_quantize_is_the_tanh_gelu() -> None:
    x = random(9, 256) * 3
    out, scale = poisoned((9, 256), torch.int8), poisoned((9, 1), torch.float32)
    gelu_quantize(x.bfloat16(), out, scale, rotated=False)
    expected = torch.nn.functional.gelu(x.bfloat16().double(), approximate="tanh")
    assert ((out.double() * scale - expected).abs() <= scale * 0.51).all()


@pytest.mark.parametrize(("m", "n", "k"), [(33, 65, 96), (1, 17, 32), (128, 64, 512)])
def test_int8_linear_is_exact_integers_and_its_epilogue(m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    a_scale, w_scale, bias, gate = (
        random(m, 1).abs(),
        random(n, 1, seed=1).abs(),
        random(n, seed=2),
        random(n, seed=3),
    )
    integers = (a.double() @ w.double().t()).float()
    expected = integers * a_scale * w_scale.t() + bias
    out = poisoned((m, n), torch.float32)
    quantized_linear(a, a_scale, w, w_scale, bias, out)
    assert torch.equal(out, expected)
    residual = random(m, n, seed=4)
    accumulated = residual.clone()
    quantized_linear(a, a_scale, w, w_scale, bias, accumulated, gate=gate, accumulate=True)
    assert torch.equal(accumulated, residual + expected * gate)


def test_gelu_is_exact_to_a_few_units_of_fp32() -> None:
    """The error against fp64, over the range in which GELU is neither 0 nor x, and beyond."""
    x = torch.cat((torch.linspace(-12, 12, 100_001), torch.tensor([-1e20, -40.0, 0.0, 40.0, 1e20])))
    wide = x.double()
    expected = wide / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    error = (gelu_tanh(x).double() - expected).abs()
    assert (error <= 4 * 2**-24 * wide.abs().clamp(max=1e19)).all()
    near = (x > -3) & (x != 0) & (x.abs() < 1e19)
    assert float((error / expected.abs())[near].max()) < 2e-6
    assert torch.equal(gelu_tanh(x[:7]), gelu_tanh(x)[:7]), "no vector tail rounds otherwise"


@pytest.mark.parametrize("rows", RAGGED)
def test_linear_applies_gelu_to_what_it_would_store(rows: int) -> None:
    a, w = (
        torch.randint(
            -127, 128, (count, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8
        )
        for count in (rows, 48)
    )
    scales = random(rows, 1).abs() * 1e-3, random(48, 1, seed=1).abs() * 1e-2, random(48, seed=2)
    plain, bent = poisoned((rows, 48), torch.float32), poisoned((rows, 48), torch.float32)
    quantized_linear(a, scales[0], w, scales[1], scales[2], plain)
    quantized_linear(a, scales[0], w, scales[1], scales[2], bent, gelu=True)
    assert torch.equal(bent, gelu_tanh(plain))
    assert torch.allclose(
        bent.double(),
        torch.nn.functional.gelu(plain.double(), approximate="tanh"),
        rtol=2e-5,
        atol=1e-6,
    )
    with pytest.raises(UnsupportedOpError, match="not both"):
        quantized_linear(a, scales[0], w, scales[1], None, bent, gelu=True, accumulate=True)


def test_fp8_linear_sums_without_rounding_whatever_the_rows() -> None:
    a = (random(64, 512) * 40).to(torch.float8_e4m3fn)
    w = (random(96, 512, seed=1) * 40).to(torch.float8_e4m3fn)
    ones = torch.ones(64, 1), torch.ones(96, 1)
    whole = poisoned((64, 96), torch.float32)
    quantized_linear(a, ones[0], w, ones[1], None, whole)
    assert torch.equal(whole, (a.double() @ w.double().t()).float())
    for start in range(0, 64, 7):
        part = a[start : start + 7]
        out = poisoned((len(part), 96), torch.float32)
        quantized_linear(part, ones[0][: len(part)], w, ones[1], None, out)
        assert torch.equal(out, whole[start : start + 7])


def test_mixed_dtypes_are_refused() -> None:
    a, w = torch.zeros(2, 256, dtype=torch.int8), torch.zeros(3, 256, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedOpError, match="equal dtypes"):
        quantized_linear(a, torch.ones(2, 1), w, torch.ones(3, 1), None, torch.empty(2, 3))
    with pytest.raises(UnsupportedOpError, match=r"not torch\.int16"):
        quantize_rows(
            random(2, 256), torch.empty(2, 256, dtype=torch.int16), torch.empty(2, 1), rotated=False
        )


def test_rms_rope_normalises_over_all_channels_and_turns_adjacent_pairs() -> None:
    x, weight = random(5, 256), random(256, seed=1)
    angles = random(5, 64, seed=2)
    heads = rms_rope(x, weight, angles.cos(), angles.sin(), num_heads=2, eps=1e-6)
    normed = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    pairs = torch.view_as_complex(normed.view(5, 2, 64, 2))
    expected = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    ).reshape(5, 2, 128)
    assert torch.allclose(heads.double(), expected.transpose(0, 1), atol=1e-5)


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
        poisoned((heads, 128, tiles), torch.float32),
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


@pytest.mark.parametrize(("pv", "largest"), [("int8", 0.008), ("fp16", 0.008), ("fp8", 0.045)])
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
    assert error <= (0.017 if rope else 0.009)


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
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


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [
        (torch.int8, 0, 1 / 254),
        (torch.float16, 2**-11, 2**-25),
        (torch.float8_e4m3fn, 2**-4, 2**-10 / 2.25),
    ],
)
def test_values_are_stored_to_half_a_step(
    dtype: torch.dtype, relative: float, absolute: float
) -> None:
    """absolute: relative to the largest value of a tile and channel."""
    v = with_outliers(random(130, 256)) * 1e5  # beyond the range of fp16
    out, scale = poisoned((2, 128, 192), dtype), poisoned((2, 128, 3), torch.float32)
    quantize_values(v, out, scale)
    stored = (out.float().unflatten(-1, (3, 64)) * scale.unsqueeze(-1)).flatten(-2)
    exact = v.t().reshape(2, 128, 130)
    largest = (scale * VALUE_MAX[dtype]).repeat_interleave(64, dim=-1)[..., :130]
    assert (
        (stored[..., :130] - exact).abs() <= (exact.abs() * relative + largest * absolute) * 1.001
    ).all()
    assert (stored[..., 130:] == 0).all()
    with pytest.raises(
        UnsupportedOpError,
        match=r"values are torch\.int8 or torch\.float16 or torch\.float8_e4m3fn, not torch\.int16",
    ):
        quantize_values(v, torch.empty(2, 128, 192, dtype=torch.int16), scale)


def test_values_need_whole_tiles() -> None:
    with pytest.raises(UnsupportedOpError, match="2 tiles of 64"):
        quantize_values(
            random(65, 256), torch.empty(2, 128, 64, dtype=torch.int8), torch.empty(2, 128, 1)
        )


def test_dispatch_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    with pytest.raises(
        UnsupportedOpError, match="no backend can run attention_int8: triton: no Triton kernel"
    ):
        dispatch.choose("attention_int8")
    monkeypatch.setenv("LOWVRAM_BACKEND", "cublas")
    with pytest.raises(UnsupportedOpError, match="use one of reference, triton"):
        dispatch.choose("attention_int8")
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    assert dispatch.choose("attention_int8") is dispatch.OPS["attention_int8"].reference
    with pytest.raises(UnsupportedOpError, match="unknown op 'softmax'"):
        dispatch.choose("softmax")
