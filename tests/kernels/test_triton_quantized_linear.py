"""Tests `quantized_linear` in Triton's interpreter.

int8 must be bit-identical to the reference, e4m3 (decoded from its bytes) close to it, and injected
faults must show.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from lowvram_kernels import quantized_linear_triton
from lowvram_kernels.common_triton import e4m3_as_float16, e4m3_bytes, stored
from lowvram_kernels.quantized_linear_triton import row_pointers

from tests.kernels import cases

# the last shape has more rows of tiles than one group
SHAPES = [(1, 17, 32), (33, 65, 96), (70, 130, 256), (31, 64, 400), (300, 65, 96)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_p18_int8_linear_has_the_bits_of_the_reference(
    m: int, n: int, k: int, out: torch.dtype
) -> None:
    assert not cases.linear(m, n, k, out=out).mismatch()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_p18_int8_linear_adds_to_the_residual_with_the_bits_of_the_reference(
    m: int, n: int, k: int
) -> None:
    assert not cases.linear_add(m, n, k).mismatch()


def test_p18_int8_linear_adds_to_fp16() -> None:
    """As the second code of an activation is."""
    case = cases.linear_add(33, 65, 96, gated=False, out=torch.float16)
    case.inputs["a_scale"] *= 1e-4
    assert not case.mismatch()
    assert case.run("triton")["out"].abs().max() < 65504


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_p18_int8_linear_with_gelu_has_the_bits_of_the_reference(
    m: int, n: int, k: int, out: torch.dtype
) -> None:
    assert not cases.linear_gelu(m, n, k, out=out).mismatch()


def test_p18_e4m3_linear_with_gelu_is_close() -> None:
    """Sums of e4m3 differ in their last bits; GELU does not amplify that."""
    case = cases.linear_gelu(33, 65, 96, code=cases.E4M3)
    expected, actual = (case.run(backend)["out"][1:-1, :65] for backend in ("reference", "triton"))
    assert torch.allclose(expected, actual, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "fault", [cases.changed(gelu=False), cases.rolled("bias"), cases.rolled("weight_scale")]
)
def test_p18_a_fault_before_gelu_shows(fault: Callable[[cases.Inputs], cases.Inputs]) -> None:
    assert cases.linear_gelu(33, 65, 96).mismatch(fault)


@pytest.mark.parametrize(
    ("name", "value"), [("C5", 0.00134), ("GELU_EXPONENT", -2.3022), ("ROUND", 12582911.0)]
)
def test_p18_a_wrong_constant_of_gelu_shows(
    monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    monkeypatch.setattr(quantized_linear_triton, name, tl.constexpr(value))
    assert cases.linear_gelu(33, 65, 96).mismatch()


def test_int8_linear_without_bias() -> None:
    case = cases.linear(33, 65, 96)
    assert not cases.Case(case.op, case.inputs | {"bias": None}, case.outputs).mismatch()


@pytest.mark.parametrize(
    "fault",
    [
        cases.rolled("a_scale"),
        cases.rolled("weight_scale"),
        cases.rolled("a"),
        cases.rolled("weight"),
        cases.rolled("bias"),
        cases.rolled("gate"),
        cases.changed(bias=None),
        cases.changed(gate=None),
        cases.changed(accumulate=False),
    ],
)
def test_p18_a_fault_in_the_linear_shows(
    fault: Callable[[cases.Inputs], cases.Inputs],
) -> None:
    assert cases.linear_add(33, 65, 96).mismatch(fault)


def test_p18_a_wrong_order_of_tiles_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    @triton.jit
    def same_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
        return 0, tl.program_id(0) % tl.cdiv(N, BLOCK_N)

    case = cases.linear(70, 130, 96)
    assert not case.mismatch()
    monkeypatch.setattr(quantized_linear_triton, "grouped_tile", same_tile)
    assert "unwritten" in case.mismatch()


def test_p18_a_second_group_of_tiles_in_the_place_of_the_first_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @triton.jit
    def first_group(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        height = tl.minimum(tiles_m, GROUP_M)
        within = tl.program_id(0) % (GROUP_M * tiles_n)
        return within % height, within // height

    monkeypatch.setattr(quantized_linear_triton, "grouped_tile", first_group)
    assert not cases.linear(70, 65, 96).mismatch()
    assert "unwritten" in cases.linear(300, 65, 96).mismatch()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_p18_e4m3_linear_sums_in_fp32(m: int, n: int, k: int) -> None:
    """The interpreter multiplies decoded bytes, as sm_80 does.

    The e4m3 instructions of tensor cores are covered by the tests on a GPU.
    """
    case = cases.linear(m, n, k, code=cases.E4M3)
    expected, actual = case.run("reference")["out"], case.run("triton")["out"]
    assert torch.equal(expected.isnan(), actual.isnan())
    assert torch.allclose(
        expected,
        actual,
        rtol=1e-5,
        atol=1e-5 * float(expected.nan_to_num().abs().max()),
        equal_nan=True,
    )
    assert (
        not torch.allclose(
            expected, case.run("triton", cases.rolled("a_scale"))["out"], rtol=1e-3, equal_nan=True
        )
        or m == 1
    )


@triton.jit
def _encode(x_ptr, code_ptr, back_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, SIZE)
    code = e4m3_bytes(tl.load(x_ptr + index))
    tl.store(code_ptr + index, code)
    tl.store(back_ptr + index, e4m3_as_float16(code).to(tl.float32) * 256.0)


def test_e4m3_is_rounded_and_read_by_bits_as_torch_does() -> None:
    """All codes, midpoints between neighbours, values next to these, subnormals and both zeros."""
    every = torch.arange(256, dtype=torch.uint8).view(cases.E4M3).float()
    exact = every[every.isfinite()]
    sizes = exact.abs().unique()
    middles = (sizes[1:] + sizes[:-1]) / 2
    near = torch.cat(
        (
            middles,
            middles * (1 + 2**-20),
            middles * (1 - 2**-20),
            sizes,
            torch.tensor([31.6, 1.0625001]),
        )
    )
    x = torch.cat((near, -near, exact))
    padded = torch.cat((x, torch.zeros(triton.next_power_of_2(len(x)) - len(x))))
    code, back = (
        torch.full(padded.shape, 0x5A, dtype=torch.uint8),
        torch.full(padded.shape, float("nan")),
    )
    _encode[(1,)](padded, code, back, SIZE=len(padded))
    expected = padded.to(cases.E4M3)
    assert torch.equal(code, expected.view(torch.uint8))
    assert torch.equal(back, expected.float())


@triton.jit
def _round(x_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, stored(tl.load(x_ptr + index), out_ptr.dtype.element_ty))


def test_bf16_is_rounded_half_to_even() -> None:
    x = torch.cat((cases.random(1000) * 1e4, 1 + torch.arange(24) * 2.0**-9))
    out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    _round[(1,)](x, out, SIZE=1024)
    assert torch.equal(out, x.bfloat16())


def test_p20_nan_stays_nan_in_bf16_whatever_its_bits() -> None:
    """A GPU's own NaN has all bits set; rounding by addition would overflow it to zero."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, -0x400000], dtype=torch.int32).repeat(256)
    out = torch.zeros(1024, dtype=torch.bfloat16)
    _round[(1,)](bits.view(torch.float32), out, SIZE=1024)
    assert bool(out.isnan().all())


def test_p20_fp16_is_clamped_and_nan_stays_nan() -> None:
    x = torch.cat(
        (cases.random(1019) * 1e4, torch.tensor([7e4, -7e4, 65519.0, math.inf, -math.inf]))
    )
    out = torch.full(x.shape, float("nan"), dtype=torch.float16)
    _round[(1,)](x, out, SIZE=1024)
    assert torch.equal(out, x.clamp(-65504, 65504).half())
    _round[(1,)](torch.full((1024,), math.nan), out, SIZE=1024)
    assert bool(out.isnan().all())


@triton.jit
def _offsets(out_ptr, base, stride, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = (1 << 20) + tl.arange(0, ROWS)
    tl.store(out_ptr + tl.arange(0, ROWS), row_pointers(base, rows, stride))


def test_row_addresses_pass_2_to_the_31() -> None:
    out = torch.full((4,), -1)
    _offsets[(1,)](out, 7, 13824, ROWS=4)
    assert out.tolist() == [7 + (2**20 + row) * 13824 for row in range(4)]


def test_linear_reads_and_writes_rows_past_2_to_the_31_elements() -> None:
    """Three rows that are 2^30 elements apart, in memory that is reserved but never touched."""
    stride, k, n = 2**30 + 64, 64, 32
    case = cases.linear(3, n, k, out=torch.bfloat16)
    far = torch.empty(2 * stride + k, dtype=torch.int8).as_strided((3, k), (stride, 1))
    far.copy_(case.inputs["a"])
    out = torch.empty(2 * stride + n, dtype=torch.bfloat16).as_strided((3, n), (stride, 1))
    quantized_linear_triton.quantized_linear(**(case.inputs | {"a": far}), out=out)
    assert torch.equal(out, case.run("reference")["out"][1:-1, :n])


def test_linear_adds_to_rows_past_2_to_the_31_elements() -> None:
    stride, k, n = 2**30 + 64, 64, 32
    case = cases.linear_add(3, n, k)
    out = torch.empty(2 * stride + n, dtype=torch.float32).as_strided((3, n), (stride, 1))
    out.copy_(case.outputs["out"].whole)
    quantized_linear_triton.quantized_linear(**case.inputs, out=out)
    assert torch.equal(out, case.run("reference")["out"])
