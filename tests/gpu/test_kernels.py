"""Every Triton kernel against its reference on a GPU, at ragged sizes and at the model's widths
(promises 18, 20).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from lowvram_kernels import dispatch, ops
from lowvram_kernels.check import checks, problems
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import PV_DTYPES, architecture, pv_choices

from tests.kernels import cases

CUDA = "cuda"
DIM, FFN, HEADS = 5120, 13824, 40
ROWS = ("adaln_quantize", "quantize_rows", "gelu_quantize")
LINEARS = [
    (1, 17, 32),
    (33, 65, 96),
    (700, 1000, DIM),
    (257, DIM, 1040),
    (130, 520, FFN),
    (2500, 300, 256),
]


@pytest.mark.parametrize("op", ops.OPS)
def test_p18_the_check_of_the_doctor_finds_that_all_agree(op: str) -> None:
    assert problems(checks(torch.device(CUDA), (op,))) == {}


@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_p18_int8_linear_has_the_bits_of_the_reference(
    m: int, n: int, k: int, out: torch.dtype
) -> None:
    assert not cases.linear(m, n, k, out=out, device=CUDA).mismatch()


@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
@pytest.mark.parametrize("gated", [True, False])
def test_p18_int8_linear_adds_to_the_residual_with_the_bits_of_the_reference(
    m: int, n: int, k: int, gated: bool
) -> None:
    assert not cases.linear_add(m, n, k, gated=gated, device=CUDA).mismatch()


@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
def test_p18_int8_linear_without_a_bias(m: int, n: int, k: int) -> None:
    case = cases.linear(m, n, k, device=CUDA)
    assert not cases.Case(case.op, case.inputs | {"bias": None}, case.outputs).mismatch()


@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
@pytest.mark.parametrize("make", [cases.linear_add, cases.linear_gelu])
def test_p18_epilogues_of_the_e4m3_linear_are_close(
    m: int, n: int, k: int, make: Callable[..., cases.Case]
) -> None:
    case = make(m, n, k, code=cases.E4M3, device=CUDA)
    cut = case.outputs["out"].cut
    expected, actual = (
        cut(case.run(backend)["out"]).double() for backend in ("reference", "triton")
    )
    assert float((expected - actual).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_p18_int8_linear_with_gelu_has_the_bits_of_the_reference(
    m: int, n: int, k: int, out: torch.dtype
) -> None:
    assert not cases.linear_gelu(m, n, k, out=out, device=CUDA).mismatch()


@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
def test_p18_e4m3_linear_is_close_and_depends_on_no_other_row(m: int, n: int, k: int) -> None:
    """Tensor cores sum e4m3 products in less than fp32; where they are decoded to fp16 the error is
    that of fp32.
    """
    case = cases.linear(m, n, k, code=cases.E4M3, device=CUDA)
    expected, actual = (
        case.run(backend)["out"][1:-1, :n].double() for backend in ("reference", "triton")
    )
    assert float((expected - actual).norm() / expected.norm()) < 2e-3
    rows = slice(0, max(1, m // 3))
    part = cases.changed(a=case.inputs["a"][rows], a_scale=case.inputs["a_scale"][rows])
    shorter = cases.Case(
        case.op,
        part(case.inputs),
        {"out": cases.Output.poisoned((rows.stop, n), torch.float32, CUDA)},
    )
    assert torch.equal(shorter.run("triton")["out"].double(), actual[rows])


@pytest.mark.parametrize(
    ("op", "code", "rotated"),
    list(itertools.product(ROWS, (torch.int8, cases.E4M3), (True, False))),
)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_p18_rows_agree_with_the_reference(
    op: str, code: torch.dtype, rotated: bool, x: torch.dtype
) -> None:
    for m, k in ((1, 256), (33, 768), (100, DIM), (17, FFN)):
        assert not cases.rows(op, m, k, code=code, rotated=rotated, x=x, device=CUDA).mismatch(), (
            m,
            k,
        )


@pytest.mark.parametrize(
    ("rope", "smoothing"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize(("m", "heads", "head_dim"), [(1, 1, 128), (100, HEADS, 128), (33, 5, 64)])
def test_p18_rms_rope_agrees_with_the_reference(
    rope: bool, smoothing: bool, m: int, heads: int, head_dim: int
) -> None:
    assert not cases.rms_rope(
        m, heads, rope=rope, smoothing=smoothing, head_dim=head_dim, device=CUDA
    ).mismatch()


@pytest.mark.parametrize("pv", [name for name, stored in STORED_VALUES.items() if stored.scaled])
@pytest.mark.parametrize(("n", "heads", "head_dim"), [(1, 1, 128), (65, 2, 64), (1000, HEADS, 128)])
def test_p18_values_agree_with_the_reference(n: int, heads: int, head_dim: int, pv: str) -> None:
    assert not cases.values(n, heads, head_dim=head_dim, code=PV_DTYPES[pv], device=CUDA).mismatch()


@pytest.mark.parametrize("pv", PV_DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "heads", "head_dim"),
    [
        (1, 1, 1, 128),
        (33, 64, 2, 64),
        (70, 130, 3, 128),
        (300, 1000, HEADS, 128),
        (257, 4097, 2, 128),
    ],
)
def test_p18_attention_agrees_with_the_reference(
    m: int, n: int, heads: int, head_dim: int, pv: str
) -> None:
    needs(pv)
    assert not cases.attention(m, n, heads, head_dim=head_dim, pv=pv, device=CUDA).mismatch()


@pytest.mark.parametrize("pv", PV_DTYPES)
def test_p18_attention_in_bf16(pv: str) -> None:
    needs(pv)
    assert not cases.attention(70, 1000, 3, pv=pv, out=torch.bfloat16, device=CUDA).mismatch()


def test_p20_a_gpus_own_nan_comes_out_of_every_kernel() -> None:
    """Made on the GPU: its bits are not those that a CPU makes."""
    nan = torch.zeros(1, device=CUDA).log().sub(torch.zeros(1, device=CUDA).log())
    for case, name, where in (
        (cases.linear(33, 65, 96, out=torch.bfloat16, device=CUDA), "a_scale", (3,)),
        (
            cases.rows("quantize_rows", 33, 512, code=torch.int8, rotated=True, device=CUDA),
            "x",
            (3, 5),
        ),
        (
            cases.rows("adaln_quantize", 33, 512, code=cases.E4M3, rotated=False, device=CUDA),
            "x",
            (3, 5),
        ),
        (cases.rms_rope(33, 2, device=CUDA), "x", (3, 5)),
        (cases.values(70, 2, device=CUDA), "v", (3, 5)),
        (cases.attention(70, 130, 2, out=torch.bfloat16, device=CUDA), "q_scale", (0, 3)),
        (cases.attention(70, 130, 2, out=torch.bfloat16, device=CUDA), "v_scale", (0, 1, 3)),
    ):
        poisoned = case.inputs[name].clone()
        poisoned[where] = nan
        scale = "out_scale" if "out_scale" in case.outputs else "out"
        written = case.outputs[scale].cut(
            case.run("triton", cases.changed(**{name: poisoned}))[scale]
        )
        assert bool(written.isnan().any()), case.op
        assert not bool(written.isnan().all()) or name == "v_scale", case.op


@pytest.mark.parametrize(
    ("pv", "largest"), [("int8", 0.008), ("fp16", 0.008), ("bf16", 0.008), ("fp8", 0.045)]
)
def test_attention_of_data_with_outliers_is_close_to_exact_attention(
    pv: str, largest: float
) -> None:
    needs(pv)
    functions = cases.AttentionOps(ops.rms_rope_quantize, ops.quantize_values, ops.attention_int8)
    assert (
        cases.attention_error(functions, 512, 4096, 4, dtype=PV_DTYPES[pv], device=CUDA) <= largest
    )


def test_fp8_values_are_refused_with_a_reason_where_no_tensor_core_takes_them() -> None:
    if "fp8" in pv_choices(architecture(torch.device(CUDA))):
        pytest.skip("this GPU multiplies e4m3")
    case = cases.attention(33, 64, 2, pv="fp8", device=CUDA)
    out = {name: output.cut(output.whole) for name, output in case.outputs.items()}
    assert "begin with sm_89" in str(ops.OPS[case.op].constraint(**case.inputs, **out))


def needs(pv: str) -> None:
    if pv not in pv_choices(architecture(torch.device(CUDA))):
        pytest.skip(f"no tensor cores for {pv} here")


@pytest.mark.parametrize("pv", PV_DTYPES)
def test_a_query_depends_on_no_other_query(pv: str) -> None:
    needs(pv)
    case = cases.attention(300, 1000, 2, pv=pv, device=CUDA)
    whole = case.run("triton")["out"][:-1]
    for start, end in ((0, 1), (1, 128), (3, 218), (128, 300)):
        part = {name: case.inputs[name][:, start:end] for name in ("q", "q_scale")}
        shorter = cases.Case(
            case.op,
            case.inputs | part,
            {"out": cases.Output.poisoned((end - start, 256), torch.float32, CUDA)},
        )
        assert torch.equal(shorter.run("triton")["out"], whole[start:end])


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (lambda: cases.linear_add(33, 65, 96, device=CUDA), cases.rolled("a_scale")),
        (lambda: cases.linear_add(33, 65, 96, device=CUDA), cases.rolled("weight")),
        (
            lambda: cases.rows(
                "quantize_rows", 33, 512, code=torch.int8, rotated=True, device=CUDA
            ),
            cases.changed(rotated=False),
        ),
        (
            lambda: cases.rows(
                "gelu_quantize", 33, 512, code=cases.E4M3, rotated=False, device=CUDA
            ),
            cases.rolled("x"),
        ),
        (
            lambda: cases.rows(
                "adaln_quantize", 33, 512, code=torch.int8, rotated=True, device=CUDA
            ),
            cases.rolled("shift"),
        ),
        (lambda: cases.rms_rope(33, 3, device=CUDA), cases.rolled("cos")),
        (lambda: cases.values(130, 2, device=CUDA), cases.rolled("v")),
        (lambda: cases.attention(70, 130, 2, device=CUDA), cases.rolled("k_scale", 1)),
        (lambda: cases.attention(70, 130, 2, device=CUDA), cases.rolled("v_scale", 2)),
        (lambda: cases.attention(70, 130, 2, pv="fp16", device=CUDA), cases.rolled("v_scale", 2)),
        (lambda: cases.linear_gelu(33, 65, 96, device=CUDA), cases.changed(gelu=False)),
    ],
)
def test_p18_a_fault_shows(
    case: Callable[[], cases.Case], fault: Callable[[cases.Inputs], cases.Inputs]
) -> None:
    assert case().mismatch(fault)


def test_rows_past_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GB of free device memory")
    stride = 2**30 + 256
    x = torch.empty(2 * stride + 256, dtype=torch.bfloat16, device=CUDA).as_strided(
        (3, 256), (stride, 1)
    )
    case = cases.rows(
        "quantize_rows", 3, 256, code=torch.int8, rotated=True, x=torch.bfloat16, device=CUDA
    )
    x.copy_(case.inputs["x"])
    assert not case.mismatch(cases.changed(x=x))
    far = torch.empty(2 * stride + 96, dtype=torch.int8, device=CUDA).as_strided(
        (3, 96), (stride, 1)
    )
    linear = cases.linear(3, 65, 96, device=CUDA)
    far.copy_(linear.inputs["a"])
    assert not linear.mismatch(cases.changed(a=far))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (lambda: cases.rms_rope(3, 2, device=CUDA), "x"),
        (lambda: cases.values(3, 2, device=CUDA), "v"),
        (lambda: cases.attention(3, 70, 3, device=CUDA), "q"),
        (lambda: cases.attention(3, 70, 3, device=CUDA), "k"),
        (lambda: cases.attention(3, 70, 3, device=CUDA), "v"),
    ],
)
def test_heads_and_values_past_2_to_the_31_elements(
    case: Callable[[], cases.Case], name: str
) -> None:
    """The first dimension, rows or heads, 2^30 elements apart."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip("needs 12 GB of free device memory")
    made, stride = case(), 2**30 + 256
    near = made.inputs[name]
    whole = torch.empty(2 * stride + near[0].numel(), dtype=near.dtype, device=CUDA)
    far = whole.as_strided(near.shape, (stride, *near[0].contiguous().stride()))
    far.copy_(near)
    assert not made.mismatch(cases.changed(**{name: far}))


def test_outputs_past_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GB of free device memory")
    stride = 2**30 + 256
    for made, width in (
        (cases.linear_add(3, 32, 64, device=CUDA), 32),
        (cases.attention(3, 70, 2, device=CUDA), 256),
    ):
        out = torch.empty(2 * stride + width, device=CUDA).as_strided((3, width), (stride, 1))
        out.copy_(made.outputs["out"].cut(made.outputs["out"].whole))
        expected = made.outputs["out"].cut(made.run("triton")["out"])
        ops.OPS[made.op].triton(**made.inputs, out=out)
        assert torch.equal(out.cpu(), expected)
        del out


def test_tensors_on_the_gpu_take_the_kernels_and_tensors_on_the_cpu_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOWVRAM_BACKEND", raising=False)
    for case in (
        cases.linear(33, 65, 96),
        cases.attention(33, 65, 1),
        cases.values(65, 1),
        cases.rms_rope(5, 2),
    ):
        op = ops.OPS[case.op]
        on_cpu = case.inputs | {
            name: output.cut(output.whole) for name, output in case.outputs.items()
        }
        on_gpu = {
            name: value.to(CUDA) if isinstance(value, torch.Tensor) else value
            for name, value in on_cpu.items()
        }
        first, *rest = on_cpu
        assert (
            dispatch.choose(case.op, on_cpu[first], **{name: on_cpu[name] for name in rest})
            is op.reference
        )
        assert (
            dispatch.choose(case.op, on_gpu[first], **{name: on_gpu[name] for name in rest})
            is op.triton
        )
