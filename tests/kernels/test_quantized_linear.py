"""The reference of `quantized_linear` against exact products (promise 18)."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.quantize_rows import gelu_tanh, quantize_rows
from lowvram_kernels.quantized_linear import quantized_linear

from tests.kernels.inputs import RAGGED, poisoned, random


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
