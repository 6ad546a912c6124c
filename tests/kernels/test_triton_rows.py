"""Tests row quantization, GELU and adaLN in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from lowvram_kernels import adaln_quantize_triton, common_triton, quantize_rows_triton

from tests.kernels import cases

OPS = ("adaln_quantize", "quantize_rows", "gelu_quantize")
CODES = {"int8": torch.int8, "fp8": cases.E4M3}
# numpy warns where exp(-u) is infinite; x / infinity is 0 there, the correct GELU.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize(
    ("op", "code", "rotated"), list(itertools.product(OPS, CODES, (True, False)))
)
def test_p18_rows_agree_with_the_reference(op: str, code: str, rotated: bool) -> None:
    for m, k in ((1, 256), (3, 768), (5, 256 if rotated else 200)):
        assert not cases.rows(op, m, k, code=CODES[code], rotated=rotated).mismatch(), (m, k)


@pytest.mark.parametrize("op", OPS)
def test_p18_rows_of_bf16_agree_with_the_reference(op: str) -> None:
    assert not cases.rows(op, 3, 512, code=torch.int8, rotated=True, x=torch.bfloat16).mismatch()


@pytest.mark.parametrize(("op", "width"), [("adaln_quantize", 5120), ("gelu_quantize", 13824)])
def test_p18_rows_as_wide_as_the_model(op: str, width: int) -> None:
    assert not cases.rows(op, 2, width, code=torch.int8, rotated=True, x=torch.bfloat16).mismatch()


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("quantize_rows", cases.rolled("x")),
        ("quantize_rows", cases.rolled("x", 1)),
        ("quantize_rows", cases.changed(rotated=False)),
        ("gelu_quantize", cases.rolled("x")),
        ("adaln_quantize", cases.rolled("scale")),
        ("adaln_quantize", cases.rolled("shift")),
        ("adaln_quantize", cases.changed(eps=0.1)),
        ("adaln_quantize", cases.changed(rotated=False)),
    ],
)
def test_p18_a_wrong_argument_of_a_row_kernel_shows(
    op: str, fault: Callable[[cases.Inputs], cases.Inputs]
) -> None:
    assert cases.rows(op, 3, 512, code=torch.int8, rotated=True).mismatch(fault)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("constant", "value", "code"),
    [("ROUND", 0.0, "int8"), ("INT8_MAX", 126.0, "int8"), ("E4M3_MAX", 440.0, "fp8")],
)
def test_p18_a_wrong_constant_of_a_row_kernel_shows(
    monkeypatch: pytest.MonkeyPatch, op: str, constant: str, value: float, code: str
) -> None:
    """Truncation instead of rounding; scales that are one step off."""
    case = cases.rows(op, 3, 512, code=CODES[code], rotated=False)
    monkeypatch.setattr(common_triton, constant, tl.constexpr(value))
    assert case.mismatch()


def test_p18_halves_rounded_to_odd_show(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.rows("quantize_rows", 3, 512, code=torch.int8, rotated=False)
    halves = torch.arange(512).remainder(250) / 2 - 60.0
    halves[0] = 127  # the scale of the row becomes 1
    case.inputs["x"][:] = halves
    assert not case.mismatch()
    monkeypatch.setattr(common_triton, "ROUND", tl.constexpr(12582911.0))
    assert case.mismatch()


def test_rows_past_2_to_the_31_elements() -> None:
    """Three rows that are 2^30 elements apart, in memory that is reserved but never touched."""
    stride, k = 2**30 + 256, 256
    case = cases.rows("quantize_rows", 3, k, code=torch.int8, rotated=True, x=torch.bfloat16)
    adaln = cases.rows("adaln_quantize", 3, k, code=torch.int8, rotated=True, x=torch.bfloat16)
    x = torch.empty(2 * stride + k, dtype=torch.bfloat16).as_strided((3, k), (stride, 1))
    x.copy_(case.inputs["x"])
    for one, function in (
        (case, quantize_rows_triton.quantize_rows),
        (adaln, adaln_quantize_triton.adaln_quantize),
    ):
        out = torch.empty(2 * stride + k, dtype=torch.int8).as_strided((3, k), (stride, 1))
        scale = torch.full((3, 1), float("nan"))
        function(**(one.inputs | {"x": x}), out=out, out_scale=scale)
        expected = one.run("reference")
        assert torch.equal(out, expected["out"][:-1])
        assert torch.allclose(scale, expected["out_scale"])
