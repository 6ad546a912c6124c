"""Tests `quantize_values` in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from lowvram_kernels import common_triton, quantize_values_triton
from lowvram_kernels.quantize_values import VALUE_MAX
from lowvram_kernels.quantize_values_triton import quantize_values
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import PV_DTYPES

from tests.kernels import cases
from tests.kernels.inputs import far_heads

QUANTIZED = [name for name, stored in STORED_VALUES.items() if stored.scaled]


@pytest.mark.parametrize("pv", QUANTIZED)
@pytest.mark.parametrize(("n", "heads", "head_dim"), [(1, 1, 128), (65, 2, 128), (200, 3, 64)])
def test_p18_values_agree_with_the_reference(n: int, heads: int, head_dim: int, pv: str) -> None:
    assert not cases.values(n, heads, head_dim=head_dim, code=PV_DTYPES[pv]).mismatch()


@pytest.mark.parametrize("pv", QUANTIZED)
def test_p18_a_fault_in_the_values_shows(monkeypatch: pytest.MonkeyPatch, pv: str) -> None:
    case = cases.values(65, 2, code=PV_DTYPES[pv])
    assert case.mismatch(cases.rolled("v"))
    assert case.mismatch(cases.rolled("v", 1))
    monkeypatch.setattr(
        quantize_values_triton, "value_max", lambda _: 0.99 * VALUE_MAX[PV_DTYPES[pv]]
    )
    assert "out_scale" in case.mismatch()


def test_p18_truncated_values_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_triton, "ROUND", tl.constexpr(0.0))
    assert cases.values(65, 2).mismatch()


def test_values_past_2_to_the_31_elements() -> None:
    """Rows that are 2^30 elements apart, in memory that is reserved but never touched."""
    stride = 2**30 + 256
    one = cases.values(3, 2)
    x = torch.empty(2 * stride + 256, dtype=torch.bfloat16).as_strided((3, 256), (stride, 1))
    x.copy_(one.inputs["v"])
    v, v_scale = torch.empty(2, 128, 64, dtype=torch.int8), torch.full((2, 1, 128, 2), float("nan"))
    quantize_values(x, v, v_scale)
    assert torch.equal(v, one.run("reference")["out"][:, :, 64:])


def test_values_are_written_past_2_to_the_31_elements() -> None:
    one, v, v_scale = (
        cases.values(70, 3),
        far_heads(128, 128),
        torch.full((3, 2, 128, 2), float("nan")),
    )
    quantize_values(one.inputs["v"], v, v_scale)
    assert torch.equal(v, one.run("reference")["out"][:, :, 64:])
