"""Which backend runs an op: by the device of its tensors, with a reason for every refusal, and never without a trace."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from lowvram_kernels import constraints, dispatch
from lowvram_kernels.tuning import ARCHITECTURES, linear_kind, linear_tile, nvidia_row

from lowvram.errors import UnsupportedError
from tests.kernels import cases

ALL = [
    cases.linear(3, 32, 32), cases.linear_add(3, 32, 32), cases.rms_rope(2, 2), cases.values(5, 1), cases.attention(3, 5, 1),
    *(cases.rows(op, 2, 256, code=torch.int8, rotated=True) for op in ("adaln_quantize", "quantize_rows", "gelu_quantize")),
]  # fmt: skip
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def arguments(case: cases.Case, **changes: object) -> dict[str, object]:
    """The call's arguments by name; the first one is positional in the library."""
    return case.inputs | {name: output.cut(output.whole) for name, output in case.outputs.items()} | changes


def choose(case: cases.Case, **changes: object) -> object:
    values = arguments(case, **changes)
    first = next(iter(values))
    return dispatch.choose(case.op, values.pop(first), **values)


def refusal(case: cases.Case, **changes: object) -> str:
    return str(dispatch.OPS[case.op].constraint(**arguments(case, **changes)))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.op)
def test_the_cpu_takes_the_reference_and_says_so_below_warnings(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LOWVRAM_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.DEBUG, "lowvram_kernels.dispatch"):
        assert choose(case) is dispatch.OPS[case.op].reference
        choose(case)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"{case.op} runs on the torch reference: its tensors are on the CPU")
    ]


@needs_triton
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.op)
def test_forced_triton_runs_in_the_interpreter_alone(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match=rf"no backend can run {case.op}: triton: no Triton kernel runs on a CPU unless"):
        choose(case)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = choose(case)
    assert chosen is dispatch.OPS[case.op].triton
    assert chosen is not dispatch.OPS[case.op].reference


def test_without_triton_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(constraints, "no_triton", lambda: "the triton package is not installed")
    with pytest.raises(UnsupportedError, match="the triton package is not installed"):
        choose(ALL[0])


def test_every_case_is_taken() -> None:
    assert [refusal(case) for case in ALL] == ["None"] * len(ALL)


def test_each_refusal_has_its_reason() -> None:
    linear, add, rope, values, attention, adaln, rows, _ = ALL
    wide = torch.zeros(256, 2)
    wrong = {
        "operands of one dtype": refusal(linear, weight=linear.inputs["weight"].float()),
        "K = 40 is not a multiple of 16": refusal(cases.linear(3, 32, 40)),
        "the residual stream is torch.bfloat16": refusal(add, out=torch.zeros(3, 32, dtype=torch.bfloat16)),
        "bias is torch.float64": refusal(linear, bias=torch.zeros(32, dtype=torch.float64)),
        "out is torch.float16": refusal(linear, out=torch.zeros(3, 32, dtype=torch.float16)),
        "last dimension of a has stride 2": refusal(linear, a=torch.zeros(3, 64, dtype=torch.int8)[:, ::2]),
        "weight_scale is not contiguous": refusal(linear, weight_scale=torch.zeros(64, 1)[::2]),
        "scale has 2 dimensions": refusal(adaln, scale=torch.zeros(2, 256)),
        "shift is not contiguous": refusal(adaln, shift=wide[:, 0]),
        "rotation needs a multiple of 256": refusal(cases.rows("quantize_rows", 2, 128, code=torch.int8, rotated=True)),
        "out is torch.int16": refusal(rows, out=torch.zeros(2, 256, dtype=torch.int16)),
        "not aligned": refusal(rows, out=torch.zeros(1024, dtype=torch.int8)[1:513].view(2, 256)),
        "rows of 40000 channels": refusal(cases.rows("quantize_rows", 1, 40000, code=torch.int8, rotated=False)),
        "heads of 96 channels": refusal(cases.rms_rope(2, 2, head_dim=96)),
        "cos is torch.float64": refusal(rope, cos=rope.inputs["cos"].double()),
        "5 keys do not fill 128": refusal(values, out=torch.zeros(1, 128, 128, dtype=torch.int8), out_scale=torch.zeros(1, 128, 2)),
        "5 keys do not fill 128 value columns": refusal(attention, v=torch.zeros(1, 128, 128, dtype=torch.int8)),
        "tokens of q and k": refusal(attention, q=torch.zeros(1, 6, 128, dtype=torch.int8)[:, ::2]),
    }
    assert {want: got for want, got in wrong.items() if want not in got} == {}


def test_tiles_of_every_architecture() -> None:
    for arch in ARCHITECTURES:
        for int8 in (True, False):
            for plain in (True, False):
                tile = linear_tile(arch, linear_kind(arch, int8), plain)
                assert not (arch in ("sm_86", "sm_89") and tile.block_m * tile.block_n > 128 * 128), "spills (kernels 2.9)"
    expected = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_120", (12, 0): "sm_120"}
    assert {capability: nvidia_row(capability) for capability in expected} == expected
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5"):
        nvidia_row((7, 5))


def test_triton_is_not_imported_before_it_is_chosen() -> None:
    found = "any(name.split('.')[0] == 'triton' or name.endswith('_triton') for name in sys.modules)"
    code = f"import sys, lowvram_kernels.dispatch; print({found})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
