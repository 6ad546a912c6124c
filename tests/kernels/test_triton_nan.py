"""Tests that NaN in an input reaches the output of every kernel (promise 20).

The references keep NaN, and a run stops when it finds one.
"""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import PV_DTYPES

from tests.kernels import cases

NAN = float("nan")
# numpy warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered", "ignore:overflow encountered", "ignore:All-NaN slice"
)


def with_nan(case: cases.Case, name: str, *where: int) -> dict[str, torch.Tensor]:
    """Return Triton's outputs with NaN at `where` in an input.

    The reference must have NaN in the same places.
    """
    poisoned = case.inputs[name].clone()
    poisoned[where] = NAN
    case = cases.Case(case.op, case.inputs | {name: poisoned}, case.outputs)
    expected, actual = case.run("reference"), case.run("triton")
    for key, value in expected.items():
        if value.dtype in (torch.float32, torch.bfloat16):
            written = ~case.outputs[key].whole.isnan() | ~value.isnan()
            assert torch.equal(value.isnan() & written, actual[key].isnan() & written), key
    return actual


@pytest.mark.parametrize("op", ["adaln_quantize", "quantize_rows", "gelu_quantize"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("code", [torch.int8, cases.E4M3])
def test_a_row_with_nan_has_a_scale_of_nan(op: str, rotated: bool, code: torch.dtype) -> None:
    case = cases.rows(op, 3, 512, code=code, rotated=rotated)
    scales = scales_of(case, with_nan(case, "x", 1, 5))
    assert scales.isnan().tolist() == [False, True, False]


def scales_of(case: cases.Case, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return case.outputs["out_scale"].cut(outputs["out_scale"]).flatten()


def test_heads_of_a_token_with_nan_have_scales_of_nan() -> None:
    case = cases.rms_rope(3, 2)
    scales = case.outputs["out_scale"].cut(with_nan(case, "x", 1, 7)["out_scale"])
    assert scales.isnan().tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("pv", [name for name, stored in STORED_VALUES.items() if stored.scaled])
def test_a_tile_of_values_with_nan_has_a_scale_of_nan(pv: str) -> None:
    case = cases.values(70, 1, code=PV_DTYPES[pv])
    scales = case.outputs["out_scale"].cut(with_nan(case, "v", 66, 7)["out_scale"])
    assert scales.isnan().nonzero()[:, :3].unique(dim=0).tolist() == [[0, 1, 7]]


@pytest.mark.parametrize("name", ["a_scale", "bias"])
def test_a_linear_hands_nan_on(name: str) -> None:
    case = cases.linear_add(33, 65, 96)
    assert bool(with_nan(case, name, 3)["out"].isnan().any())


@pytest.mark.parametrize("pv", PV_DTYPES)
@pytest.mark.parametrize(
    ("name", "where"), [("q_scale", (0, 1)), ("k_scale", (0,)), ("v_scale", (0, 1, 5))]
)
def test_attention_hands_nan_on(pv: str, name: str, where: tuple[int, ...]) -> None:
    """NaN in a query's scale reaches its row; in all keys' or a tile's value scales, every row."""
    case = cases.attention(3, 70, 1, pv=pv)
    if case.inputs[name] is None:  # bf16 values: their own NaN
        name, where = "v", (5, 1)
    out = case.outputs["out"].cut(with_nan(case, name, *where)["out"])
    assert bool(out[1].isnan().any())
    if name == "q_scale":
        assert out.isnan().any(dim=-1).tolist() == [False, True, False]
