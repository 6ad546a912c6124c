"""Tests `adaln_quantize` in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from lowvram_kernels import adaln_quantize_triton

from tests.kernels import cases, row_checks

OPS = ("adaln_quantize",)


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
        ("adaln_quantize", cases.rolled("scale")),
        ("adaln_quantize", cases.rolled("shift")),
        ("adaln_quantize", cases.changed(eps=0.1)),
        ("adaln_quantize", cases.changed(rotated=False)),
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


def test_p18_rows_as_wide_as_the_model() -> None:
    row_checks.check_bf16("adaln_quantize", 2, 5120)


def test_rows_past_2_to_the_31_elements() -> None:
    row_checks.check_rows_past_2_to_the_31_elements(
        "adaln_quantize", adaln_quantize_triton.adaln_quantize
    )
