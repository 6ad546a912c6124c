"""Tests `rms_rope_quantize` in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowvram_kernels.rms_rope_quantize_triton import rms_rope_quantize

from tests.kernels import cases
from tests.kernels.inputs import far_heads


@pytest.mark.parametrize(
    ("rope", "smoothing"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize(("m", "heads", "head_dim"), [(1, 1, 128), (5, 3, 128), (4, 5, 64)])
def test_p18_rms_rope_agrees_with_the_reference(
    rope: bool, smoothing: bool, m: int, heads: int, head_dim: int
) -> None:
    assert not cases.rms_rope(
        m, heads, rope=rope, smoothing=smoothing, head_dim=head_dim
    ).mismatch()


@pytest.mark.parametrize(
    "fault",
    [
        cases.rolled("x"),
        cases.rolled("weight"),
        cases.rolled("cos"),
        cases.rolled("sin"),
        cases.changed(smoothing=None),
        cases.changed(cos=None, sin=None),
        cases.changed(eps=0.1),
        cases.rolled("smoothing"),
    ],
)
def test_p18_a_fault_in_rms_rope_shows(fault: Callable[[cases.Inputs], cases.Inputs]) -> None:
    assert cases.rms_rope(5, 3).mismatch(fault)


def test_heads_past_2_to_the_31_elements() -> None:
    """Rows that are 2^30 elements apart, in memory that is reserved but never touched."""
    stride = 2**30 + 256
    case = cases.rms_rope(3, 2)
    x = torch.empty(2 * stride + 256, dtype=torch.bfloat16).as_strided((3, 256), (stride, 1))
    x.copy_(case.inputs["x"])
    out, scale = torch.empty(2, 3, 128, dtype=torch.int8), torch.full((2, 3), float("nan"))
    rms_rope_quantize(**(case.inputs | {"x": x}), out=out, out_scale=scale)
    assert torch.equal(out, case.run("reference")["out"][:, 1:-2])


def test_heads_are_written_past_2_to_the_31_elements() -> None:
    case, out, scale = cases.rms_rope(5, 3), far_heads(5, 128), torch.full((3, 5), float("nan"))
    rms_rope_quantize(**case.inputs, out=out, out_scale=scale)
    assert torch.equal(out, case.run("reference")["out"][:, 1:-2])
