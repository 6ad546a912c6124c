"""Tests `attention_int8` in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from lowvram_kernels import attention_int8_triton
from lowvram_kernels.attention_int8_triton import attention_int8
from lowvram_kernels.common_triton import e4m3_bytes
from lowvram_kernels.quantize_values_triton import quantize_values
from lowvram_kernels.rms_rope_quantize_triton import rms_rope_quantize
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import PV_DTYPES

from tests.kernels import cases
from tests.kernels.inputs import far_heads

QUANTIZED = [name for name, stored in STORED_VALUES.items() if stored.scaled]


@pytest.mark.parametrize("pv", PV_DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "heads", "head_dim"),
    [(1, 1, 1, 128), (33, 64, 2, 128), (70, 130, 2, 128), (100, 200, 1, 64)],
)
def test_p18_attention_agrees_with_the_reference(
    m: int, n: int, heads: int, head_dim: int, pv: str
) -> None:
    assert not cases.attention(m, n, heads, head_dim=head_dim, pv=pv).mismatch()


@pytest.mark.parametrize("pv", PV_DTYPES)
def test_p18_attention_in_bf16(pv: str) -> None:
    case = cases.attention(33, 130, 2, out=torch.bfloat16, pv=pv)
    expected, actual = (
        case.run("reference")["out"][:-1].float(),
        case.run("triton")["out"][:-1].float(),
    )
    assert float((expected - actual).norm() / expected.norm()) < 2**-9


@pytest.mark.parametrize("pv", PV_DTYPES)
@pytest.mark.parametrize(
    "fault",
    [
        cases.rolled("q_scale", 1),
        cases.rolled("k_scale", 1),
        cases.rolled("k", 1),
        cases.rolled_bytes("v", 0),
        cases.rolled_bytes("v", -1),
        cases.rolled("q", 1),
    ],
)
def test_p18_a_fault_in_the_inputs_of_attention_shows(
    fault: Callable[[cases.Inputs], cases.Inputs], pv: str
) -> None:
    assert cases.attention(40, 130, 2, pv=pv).mismatch(fault)


@pytest.mark.parametrize("pv", QUANTIZED)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_p18_a_fault_in_the_scales_of_values_shows(pv: str, dim: int) -> None:
    """Scales of another head, tile or channel."""
    assert cases.attention(40, 130, 2, pv=pv).mismatch(cases.rolled("v_scale", dim))


@pytest.mark.parametrize("left", [1, 63, 64, 65, 127, 128, 129])
def test_p18_attention_of_an_incomplete_step(left: int) -> None:
    """Keys past the last are in memory, with scales and values that would show."""
    for pv in PV_DTYPES:
        assert not cases.attention(20, left, 2, pv=pv).mismatch(), pv


@pytest.mark.parametrize("pv", PV_DTYPES)
@pytest.mark.parametrize("n", [40, 64, 130])
def test_p18_attention_as_other_architectures_run_it(
    monkeypatch: pytest.MonkeyPatch, n: int, pv: str
) -> None:
    """RDNA masks every step and keeps the keys in order; Triton 3.6 reads scales four times."""
    monkeypatch.setattr(attention_int8_triton, "one_loop", lambda arch, pv: True)
    monkeypatch.setattr(attention_int8_triton, "permuted", lambda arch, pv: False)
    monkeypatch.setattr(attention_int8_triton, "scale_copies", lambda arch, pv: 4)
    assert not cases.attention(33, n, 2, pv=pv).mismatch()


@pytest.mark.parametrize("pv", PV_DTYPES)
def test_p18_a_key_left_out_or_read_past_the_end_shows(pv: str) -> None:
    case = cases.attention(40, 130, 2, pv=pv)
    shorter = cases.changed(
        k=case.inputs["k"][:, :129].contiguous(),
        k_scale=case.inputs["k_scale"][:, :129].contiguous(),
    )
    if pv == "bf16":
        shorter = cases.changed(**shorter(case.inputs) | {"v": case.inputs["v"][:129]})
    assert case.mismatch(shorter)


@pytest.mark.parametrize("value", [12582912.0 - 127.0, 12582912.0])
def test_p18_a_wrong_offset_of_the_probabilities_shows(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(attention_int8_triton, "ROUND_LESS_128", tl.constexpr(value))
    assert cases.attention(40, 130, 2).mismatch()


@triton.jit
def _swapped_channels(scales, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    halves = tl.reshape(scales, (2, HEAD_DIM // 2, 2))
    low, high = tl.split(tl.permute(halves, (1, 2, 0)))
    return high, low


@triton.jit
def _other_order(codes):  # type: ignore[no-untyped-def]
    return codes


@triton.jit
def _shrunk(x):  # type: ignore[no-untyped-def]
    return e4m3_bytes(x * 0.95)


@pytest.mark.parametrize(
    ("pv", "name", "fault"),
    [
        *((pv, "split_channels", _swapped_channels) for pv in QUANTIZED),
        ("int8", "in_key_order", _other_order),
        ("int8", "START_BITS", tl.constexpr(0x4B401000)),
        ("int8", "LOG2_255", tl.constexpr(7.9)),
        ("fp8", "LOG2_448", tl.constexpr(9.5)),
        ("fp8", "e4m3_bytes", _shrunk),
    ],
)
def test_p18_a_fault_inside_attention_shows(
    monkeypatch: pytest.MonkeyPatch, pv: str, name: str, fault: object
) -> None:
    """Scales of the other channels, probabilities of other keys, too large or too small."""
    case = cases.attention(40, 200, 2, pv=pv)
    monkeypatch.setattr(attention_int8_triton, name, fault)
    assert case.mismatch()


@pytest.mark.parametrize("pv", PV_DTYPES)
def test_a_query_depends_on_no_other_query(pv: str) -> None:
    case = cases.attention(100, 130, 2, pv=pv)
    whole = case.run("triton")["out"][:-1]
    for start, end in ((0, 1), (1, 64), (3, 18), (64, 100)):
        part = {name: case.inputs[name][:, start:end] for name in ("q", "q_scale")}
        out = torch.full((end - start, 256), float("nan"))
        attention_int8(**(case.inputs | part), out=out)
        assert torch.equal(out, whole[start:end])


@pytest.mark.parametrize(
    ("pv", "largest"), [("int8", 0.008), ("fp16", 0.008), ("bf16", 0.008), ("fp8", 0.045)]
)
@pytest.mark.parametrize(("m", "n", "heads"), [(64, 200, 2), (40, 333, 3)])
def test_attention_of_data_with_outliers_is_close_to_exact_attention(
    m: int, n: int, heads: int, pv: str, largest: float
) -> None:
    """All three kernels in the order in which a block calls them."""
    assert cases.attention_error(triton_ops(), m, n, heads, dtype=PV_DTYPES[pv]) <= largest


def test_p18_keys_that_are_not_smoothed_show() -> None:
    smoothed, plain = (
        cases.attention_error(triton_ops(), 64, 200, 2, dtype=torch.int8, smoothed=smoothed)
        for smoothed in (True, False)
    )
    assert plain > 1.1 * smoothed


def triton_ops() -> cases.AttentionOps:
    return cases.AttentionOps(rms_rope_quantize, quantize_values, attention_int8)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_attention_reads_past_2_to_the_31_elements(name: str) -> None:
    case = cases.attention(3, 70, 3)
    near = case.inputs[name]
    far = far_heads(*near.shape[1:])
    far.copy_(near)
    assert not case.mismatch(cases.changed(**{name: far}))


def test_attention_writes_rows_past_2_to_the_31_elements() -> None:
    case = cases.attention(3, 70, 2)
    stride = 2**30 + 256
    out = torch.empty(2 * stride + 256, dtype=torch.bfloat16).as_strided((3, 256), (stride, 1))
    attention_int8(**case.inputs, out=out)
    expected = case.run("triton")["out"][:-1]
    assert torch.equal(out, expected.bfloat16())
