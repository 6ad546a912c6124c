"""Tests `quantize_rows` and `gelu_quantize` in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from lowvram_kernels import common_triton, quantize_rows_triton

from tests.kernels import cases, row_checks

OPS = ("quantize_rows", "gelu_quantize")
# numpy warns where exp(-u) is infinite; x / infinity is 0 there, the correct GELU.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize(
    ("op", "code", "rotated"), list(itertools.product(OPS, row_checks.CODES, (True, False)))
)
def test_p18_rows_agree_with_the_reference(op: str, code: str, rotated: bool) -> None:
    row_checks.check_agreement(op, code, rotated)


@pytest.mark.parametrize(("op", "rotated"), list(itertools.product(OPS, (True, False))))
def test_p18_second_codes_agree_with_the_reference(op: str, rotated: bool) -> None:
    row_checks.check_two_codes(op, rotated)


@pytest.mark.parametrize("op", OPS)
def test_p18_rows_of_bf16_agree_with_the_reference(op: str) -> None:
    row_checks.check_bf16(op, 3, 512)


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("quantize_rows", cases.rolled("x")),
        ("quantize_rows", cases.rolled("x", 1)),
        ("quantize_rows", cases.changed(rotated=False)),
        ("gelu_quantize", cases.rolled("x")),
    ],
)
def test_p18_a_wrong_argument_of_a_row_kernel_shows(
    op: str, fault: Callable[[cases.Inputs], cases.Inputs]
) -> None:
    row_checks.check_that_a_fault_shows(op, fault)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("constant", "value", "code"), row_checks.CONSTANTS)
def test_p18_a_wrong_constant_of_a_row_kernel_shows(
    monkeypatch: pytest.MonkeyPatch, op: str, constant: str, value: float, code: str
) -> None:
    row_checks.check_that_a_constant_shows(monkeypatch, op, constant, value, code)


def test_p18_gelu_of_rows_as_wide_as_the_model() -> None:
    row_checks.check_bf16("gelu_quantize", 2, 13824)


def test_p18_halves_rounded_to_odd_show(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.rows("quantize_rows", 3, 512, code=torch.int8, rotated=False)
    halves = torch.arange(512).remainder(250) / 2 - 60.0
    halves[0] = 127  # the scale of the row becomes 1
    case.inputs["x"][:] = halves
    assert not case.mismatch()
    monkeypatch.setattr(common_triton, "ROUND", tl.constexpr(12582911.0))
    assert case.mismatch()


def test_rows_past_2_to_the_31_elements() -> None:
    row_checks.check_rows_past_2_to_the_31_elements(
        "quantize_rows", quantize_rows_triton.quantize_rows
    )
