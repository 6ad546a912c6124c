"""Tests the selection of an op's backend: by device, with a logged reason for every fallback."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lowvram_kernels import constraints, dispatch, ops, sizes, tuning
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.tuning import ARCHITECTURES, linear_kind, linear_tile, nvidia_row

from lowvram.formats import FORMATS
from lowvram.planner.phases import PlanChoice
from lowvram.planner.workspace import dit_workspace
from tests.helpers.checkpoints import tiny_config
from tests.helpers.runs import expert_velocities, make_store
from tests.kernels import cases

ALL = [
    cases.linear(3, 32, 32),
    cases.linear_add(3, 32, 32),
    cases.rms_rope(2, 2),
    cases.values(5, 1),
    cases.attention(3, 5, 1),
    *(
        cases.rows(op, 2, 256, code=torch.int8, rotated=True)
        for op in ("adaln_quantize", "quantize_rows", "gelu_quantize")
    ),
]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def arguments(case: cases.Case, **changes: object) -> dict[str, object]:
    """Return the call's arguments by name."""
    return (
        case.inputs
        | {name: output.cut(output.whole) for name, output in case.outputs.items()}
        | changes
    )


def choose(case: cases.Case, **changes: object) -> object:
    values = arguments(case, **changes)
    first = next(iter(values))
    return dispatch.choose(case.op, values.pop(first), **values)


def refusal(case: cases.Case, **changes: object) -> str:
    return str(ops.OPS[case.op].constraint(**arguments(case, **changes)))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.op)
def test_the_cpu_takes_the_reference_and_says_so_below_warnings(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LOWVRAM_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.DEBUG, "lowvram_kernels.dispatch"):
        assert choose(case) is ops.OPS[case.op].reference
        choose(case)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"{case.op} runs on the torch reference: its tensors are on the CPU")
    ]


@needs_triton
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.op)
def test_forced_triton_runs_in_the_interpreter_alone(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        UnsupportedOpError,
        match=rf"no backend can run {case.op}: triton: no Triton kernel runs on a CPU unless",
    ):
        choose(case)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = choose(case)
    assert chosen is ops.OPS[case.op].triton
    assert chosen is not ops.OPS[case.op].reference


def test_without_triton_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(constraints, "no_triton", lambda: "the triton package is not installed")
    with pytest.raises(UnsupportedOpError, match="the triton package is not installed"):
        choose(ALL[0])


def test_every_case_is_taken() -> None:
    assert [refusal(case) for case in ALL] == ["None"] * len(ALL)


def test_each_refusal_has_its_reason() -> None:
    linear, add, rope, values, attention, adaln, rows, _ = ALL
    wide = torch.zeros(256, 2)
    wrong = {
        "a and weight need the same dtype": refusal(linear, weight=linear.inputs["weight"].float()),
        "K = 40 is not a multiple of 16": refusal(cases.linear(3, 32, 40)),
        "gate is torch.float64": refusal(add, gate=torch.zeros(32, dtype=torch.float64)),
        "bias is torch.float64": refusal(linear, bias=torch.zeros(32, dtype=torch.float64)),
        "out is torch.float64": refusal(linear, out=torch.zeros(3, 32, dtype=torch.float64)),
        "last dimension of a has stride 2": refusal(
            linear, a=torch.zeros(3, 64, dtype=torch.int8)[:, ::2]
        ),
        "weight_scale is not contiguous": refusal(linear, weight_scale=torch.zeros(64, 1)[::2]),
        "scale has 2 dimensions": refusal(adaln, scale=torch.zeros(2, 256)),
        "shift is not contiguous": refusal(adaln, shift=wide[:, 0]),
        "rotation needs a multiple of 256": refusal(
            cases.rows("quantize_rows", 2, 128, code=torch.int8, rotated=True)
        ),
        "out is torch.int16": refusal(rows, out=torch.zeros(2, 256, dtype=torch.int16)),
        "not aligned": refusal(rows, out=torch.zeros(1024, dtype=torch.int8)[1:513].view(2, 256)),
        "low is torch.float32": refusal(
            rows, low=torch.zeros(2, 256), low_scale=rows.inputs["x"].new_zeros(2, 1)
        ),
        "rows of low are 512 elements apart, those of out 256": refusal(
            rows,
            low=torch.zeros(2, 512, dtype=torch.int8)[:, :256],
            low_scale=rows.inputs["x"].new_zeros(2, 1),
        ),
        "rows of 40000 channels": refusal(
            cases.rows("quantize_rows", 1, 40000, code=torch.int8, rotated=False)
        ),
        "heads of 96 channels": refusal(cases.rms_rope(2, 2, head_dim=96)),
        "cos is torch.float64": refusal(rope, cos=rope.inputs["cos"].double()),
        "5 keys do not fill 128": refusal(
            values, out=torch.zeros(1, 128, 128, dtype=torch.int8), out_scale=torch.zeros(1, 128, 2)
        ),
        "5 keys do not fill 128 value columns": refusal(
            attention, v=torch.zeros(1, 128, 128, dtype=torch.int8)
        ),
        "GELU(y) or adds gate": refusal(add, gelu=True),
        "v is torch.float32": refusal(attention, v=attention.inputs["v"].float()),
        "q is torch.float16": refusal(attention, q=attention.inputs["q"].half()),
        "tokens of a head are not contiguous": refusal(
            attention, q=torch.zeros(1, 6, 128, dtype=torch.int8)[:, ::2]
        ),
    }
    assert {want: got for want, got in wrong.items() if want not in got} == {}


@pytest.mark.parametrize("make", [cases.rms_rope, cases.values, cases.attention])
def test_p19_heads_of_another_width_take_the_reference_with_a_reason(
    make: Callable[..., cases.Case],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Heads that are not 64 or 128 wide fall back on a GPU, with the reason in the log."""
    monkeypatch.setattr(constraints, "wrong_device", lambda tensor: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("LOWVRAM_BACKEND", raising=False)
    sizes = (5, 64, 2) if make is cases.attention else (5, 2)
    for width in (64, 128):
        assert refusal(make(*sizes, head_dim=width)) == "None"
    case = make(*sizes, head_dim=96)
    with caplog.at_level(logging.INFO, "lowvram_kernels.dispatch"):
        assert choose(case) is ops.OPS[case.op].reference
    assert caplog.messages == [
        f"{case.op} runs on the torch reference: triton: heads of 96 channels: the "
        f"kernels take 64 or 128"
    ]


def test_p19_fp8_values_need_tensor_cores_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    case = cases.attention(3, 5, 1, pv="fp8")
    for arch, taken in (("sm_86", False), ("sm_89", True), ("gfx1100", False), ("sm_120", True)):
        constraints._no_e4m3.cache_clear()
        monkeypatch.setattr(tuning, "architecture", lambda device, arch=arch: arch)
        said = refusal(case)
        assert said == (
            "None"
            if taken
            else f"{arch} has no tensor cores for float8_e4m3fn values: they begin with sm_89"
        )
    constraints._no_e4m3.cache_clear()


def test_the_values_of_attention_are_the_users_choice_or_the_architectures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.delenv("LOWVRAM_PV", raising=False)
    for arch in ARCHITECTURES:
        monkeypatch.setattr(tuning, "architecture", lambda device, arch=arch: arch)
        expected = torch.bfloat16 if arch == "sm_90" else torch.int8
        assert tuning.pv_dtype(cuda) == expected
        assert sizes.values_name(arch) == tuning.values_of(expected)
    monkeypatch.setenv("LOWVRAM_PV", "fp8")
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_86")
    with pytest.raises(
        UnsupportedOpError, match=r"LOWVRAM_PV=fp8 on sm_86: use one of int8, fp16$"
    ):
        tuning.pv_dtype(cuda)
    assert tuning.pv_dtype(cpu) == torch.float8_e4m3fn
    monkeypatch.setenv("LOWVRAM_PV", "fp4")
    with pytest.raises(
        UnsupportedOpError, match=r"LOWVRAM_PV=fp4: use one of int8, fp16, fp8, bf16$"
    ):
        tuning.pv_dtype(cpu)


@pytest.mark.parametrize(
    "forced", [False, True], ids=["a GPU without a row", "the reference is forced"]
)
def test_p19_a_gpu_that_the_references_serve_takes_every_product(
    forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> str:
        raise UnsupportedOpError(
            "compute capability 7.5 has no 8-bit tensor cores that Triton can use"
        )

    monkeypatch.setattr(tuning, "architecture", (lambda device: "sm_86") if forced else refuse)
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference" if forced else "")
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        monkeypatch.setenv("LOWVRAM_PV", name)
        assert tuning.pv_dtype(torch.device("cuda", 0)) == dtype


def test_p19_a_triton_that_does_not_start_is_a_reason_to_fall_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a C compiler, which Triton needs at its first launch."""

    class Broken:
        def get_current_target(self) -> None:
            raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    monkeypatch.setitem(
        sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active=Broken()))
    )
    monkeypatch.setattr(constraints, "no_triton", lambda: None)
    monkeypatch.setattr(constraints, "_old_device", lambda index: None)
    constraints.broken_triton.cache_clear()
    try:
        assert (
            constraints.refused_gpu(torch.device("cuda", 0))
            == "Triton does not start: Command '['gcc', 'main.c']' returned non-zero exit status 1."
        )
    finally:
        constraints.broken_triton.cache_clear()


def test_a_model_with_values_in_another_dtype_has_room_for_them_and_the_same_bits_in_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, tiny_config(num_layers=1), "int8")
    latents, features = cases.random(16, 3, 8, 14), [cases.random(9, store.config.dit.text_dim)]

    def velocity(pv: str, chunk: int) -> torch.Tensor:
        monkeypatch.setenv("LOWVRAM_PV", pv)
        return expert_velocities(
            store,
            "low_noise",
            (112, 64),
            9,
            latents,
            500,
            features,
            PlanChoice(chunk, 1, 0, 0, False),
        )[0]

    exact = velocity("int8", 128)
    for pv in ("fp16", "fp8", "bf16"):
        other = velocity(pv, 128)
        assert torch.equal(other, velocity(pv, 64))
        assert not torch.equal(other, exact)
        assert float((other - exact).norm() / exact.norm()) < 0.02
    wide, narrow = (
        dit_workspace(store.config.dit, FORMATS["int8"], 130, 64, 1, values).regions
        for values in ("fp16", "fp8")
    )
    assert wide["values"][1] == 2 * narrow["values"][1]
    assert wide["keys"][1] == narrow["keys"][1]


def test_tiles_of_every_architecture() -> None:
    shared_kb = {"sm_80": 163, "sm_90": 227, "gfx1100": 64}  # of one block; others: 99
    for arch in ARCHITECTURES:
        for int8 in (True, False):
            for prefetches in (True, False) if arch != "gfx1100" else (False,):
                tile = linear_tile(arch, linear_kind(arch, int8), prefetches=prefetches)
                # half of a thread's registers hold the sums
                assert tile.block_m * tile.block_n <= tile.warps * 32 * 128
                operands = (tile.block_m + tile.block_n) * tile.block_k * (tile.stages - 1)
                assert operands <= shared_kb.get(arch, 99) * 1024
    expected = {
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 7): "sm_86",
        (8, 9): "sm_89",
        (9, 0): "sm_90",
        (12, 0): "sm_120",
    }
    assert {capability: nvidia_row(capability) for capability in expected} == expected
    with pytest.raises(UnsupportedOpError, match=r"compute capability 7\.5"):
        nvidia_row((7, 5))


def test_triton_is_not_imported_before_it_is_chosen() -> None:
    found = (
        "any(name.split('.')[0] == 'triton' or name.endswith('_triton') for name in sys.modules)"
    )
    code = f"import sys, lowvram_kernels.dispatch; print({found})"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


def test_p19_tensors_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "wrong_device", lambda tensor: None)
    case = cases.linear(3, 32, 32)
    op, out = (
        ops.OPS[case.op],
        {name: output.cut(output.whole) for name, output in case.outputs.items()},
    )
    assert op.refusal(**case.inputs, **out) is None
    elsewhere = {"weight": case.inputs["weight"].to("meta")}
    assert op.refusal(**(case.inputs | elsewhere), **out) == "its tensors are on cpu and meta"


def test_an_op_runs_with_the_gpu_of_its_tensors_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device, whatever the device of its tensors.

    An op on the CPU leaves the current device alone.
    """
    events: list[str] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        dispatch,
        "choose",
        lambda name, *args, **kwargs: lambda *args, **kwargs: events.append(name),
    )
    x = torch.zeros(1)
    ops.quantize_rows(x, x, x, rotated=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    ops.quantize_rows(x, x, x, rotated=False)
    assert events == ["quantize_rows", "enter", "quantize_rows", "leave"]
