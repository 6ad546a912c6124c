"""Checks that the kernels of `adaln_quantize`, `quantize_rows` and `gelu_quantize` share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from lowvram_kernels import common_triton

from tests.kernels import cases

CODES = {"int8": torch.int8, "fp8": cases.E4M3}
# A constant of the kernels, a wrong value (truncation instead of rounding, scales one step off) and
# the codes that it shows in.
CONSTANTS = [("ROUND", 0.0, "int8"), ("INT8_MAX", 126.0, "int8"), ("E4M3_MAX", 440.0, "fp8")]


def check_agreement(op: str, code: str, rotated: bool) -> None:
    for m, k in ((1, 256), (3, 768), (5, 256 if rotated else 200)):
        assert not cases.rows(op, m, k, code=CODES[code], rotated=rotated).mismatch(), (m, k)


def check_two_codes(op: str, rotated: bool) -> None:
    case = cases.rows(op, 3, 768, code=torch.int8, rotated=rotated, two_codes=True)
    assert not case.mismatch()
    steps = tl.constexpr(252.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common_triton, "LOW_STEPS", steps)
        assert case.mismatch()


def check_bf16(op: str, m: int, width: int) -> None:
    assert not cases.rows(op, m, width, code=torch.int8, rotated=True, x=torch.bfloat16).mismatch()


def check_that_a_fault_shows(op: str, fault: Callable[[cases.Inputs], cases.Inputs]) -> None:
    assert cases.rows(op, 3, 512, code=torch.int8, rotated=True).mismatch(fault)


def check_that_a_constant_shows(
    monkeypatch: pytest.MonkeyPatch, op: str, constant: str, value: float, code: str
) -> None:
    case = cases.rows(op, 3, 512, code=CODES[code], rotated=False)
    monkeypatch.setattr(common_triton, constant, tl.constexpr(value))
    assert case.mismatch()


def check_rows_past_2_to_the_31_elements(op: str, function: Callable[..., None]) -> None:
    """Three rows that are 2^30 elements apart, in memory that is reserved but never touched."""
    stride, k = 2**30 + 256, 256
    case = cases.rows(op, 3, k, code=torch.int8, rotated=True, x=torch.bfloat16)
    x = torch.empty(2 * stride + k, dtype=torch.bfloat16).as_strided((3, k), (stride, 1))
    x.copy_(case.inputs["x"])
    out = torch.empty(2 * stride + k, dtype=torch.int8).as_strided((3, k), (stride, 1))
    scale = torch.full((3, 1), float("nan"))
    function(**(case.inputs | {"x": x}), out=out, out_scale=scale)
    expected = case.run("reference")
    assert torch.equal(out, expected["out"][:-1])
    assert torch.allclose(scale, expected["out_scale"])
