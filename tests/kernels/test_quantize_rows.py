"""The references of `quantize_rows` and `gelu_quantize` against formulas (promise 18)."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_kernels.hadamard import rotate
from lowvram_kernels.quantize_rows import gelu_quantize, gelu_tanh, quantize_rows
from lowvram_kernels.quantized_linear import quantized_linear

from tests.kernels.inputs import RAGGED, poisoned, random, with_outliers


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


def test_gelu_quantize_is_the_tanh_gelu() -> None:
    x = random(9, 256) * 3
    out, scale = poisoned((9, 256), torch.int8), poisoned((9, 1), torch.float32)
    gelu_quantize(x.bfloat16(), out, scale, rotated=False)
    expected = torch.nn.functional.gelu(x.bfloat16().double(), approximate="tanh")
    assert ((out.double() * scale - expected).abs() <= scale * 0.51).all()


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


@pytest.mark.parametrize("rotated", [True, False])
def test_a_second_code_takes_up_what_the_first_loses(rotated: bool) -> None:
    """The error is at most 1 / 508 of the scale, and both products add up."""
    x = with_outliers(random(5, 512))
    out, low = poisoned((5, 512), torch.int8), poisoned((5, 512), torch.int8)
    scale, low_scale = poisoned((5, 1), torch.float32), poisoned((5, 1), torch.float32)
    quantize_rows(x, out, scale, rotated=rotated, low=low, low_scale=low_scale)
    exact = rotate(x) if rotated else x
    error = (out * scale + low * low_scale - exact).abs()
    assert (error <= scale / 508 * 1.01).all()
    assert torch.allclose(low_scale * 254, scale)
    codes = poisoned((5, 512), torch.int8)
    quantize_rows(x, codes, scale, rotated=rotated)
    assert torch.equal(codes, out)
    weight, w_scale = random(16, 512, seed=1).mul(30).to(torch.int8), torch.ones(16, 1)
    y = poisoned((5, 16), torch.float32)
    quantized_linear(out, scale, weight, w_scale, None, y)
    quantized_linear(low, low_scale, weight, w_scale, None, y, accumulate=True)
    expected = exact.double() @ weight.double().t()
    one = poisoned((5, 16), torch.float32)
    quantized_linear(out, scale, weight, w_scale, None, one)
    errors = [float((result - expected).norm() / expected.norm()) for result in (one, y)]
    assert errors[1] < errors[0] / 100


def test_activations_beyond_fp16_are_clamped() -> None:
    a = torch.full((1, 256), 127, dtype=torch.int8)
    weight = torch.cat((a, -a))
    y = poisoned((1, 2), torch.float16)
    quantized_linear(a, torch.ones(1, 1), weight, torch.ones(2, 1), None, y)
    assert y.tolist() == [[65504, -65504]]
