"""Tests the static bounds of the compiled kernels.

Instructions are counted correctly, the committed table matches the code, and the gate fails when a
bound falls.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import sass, static_bound
from scripts.static_bound import Bound

ROOT = Path(__file__).parents[2]


NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
.L_x_2:
        /*0020*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0030*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0040*/              @!P0 FFMA R3, R3, R4, R5 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   FADD R3, R3, R3 ;
        /*0090*/                   BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00b0*/                   EXIT ;
"""


def test_the_hot_loop_is_the_innermost_with_matrix_instructions() -> None:
    loop = sass.hot_loop(NESTED)
    assert loop is not None
    assert loop.opcodes == {"LDSM.16.M88.4": 1, "IMMA.16832.S8.S8": 1, "FFMA": 1, "BRA": 1}
    assert loop.work == {"int8": 16 * 8 * 32}
    cycles = loop.cycles(sass.CARDS["sm_86"], warps=8)
    assert cycles == {
        "tensor": 4096 * 8 / 1024,
        "issue": 8.0,
        "fma": 2.0,
        "alu": 0.0,
        "xu": 0.0,
        "lsu": 512 * 8 / 128,
    }
    assert loop.cycles(sass.CARDS["sm_80"], warps=8)["fma"] == 4.0
    assert loop.unclassified == []
    assert sass.hot_loop("        /*0000*/                   EXIT ;") is None


@pytest.mark.parametrize(
    ("opcode", "kind", "work"),
    [
        ("IMMA.16832.S8.S8.SAT", "int8", 4096),
        ("HMMA.16816.F32.BF16", "half", 2048),
        ("HMMA.16816.F16", "half_half", 2048),
        ("QMMA.16832.F32.E4M3.E4M3", "fp8", 4096),
        ("QMMA.16832.F16.E4M3.E4M3", "fp8_half", 4096),
        ("IGMMA.64x128x32.S8.S8", "int8", 64 * 128 * 32 / 4),
        ("HGMMA.64x64x16.F32.BF16", "half", 64 * 64 * 16 / 4),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", "fp8", 64 * 256 * 32 / 4),
    ],
)
def test_multiplications_of_matrix_instructions(opcode: str, kind: str, work: float) -> None:
    assert sass.multiplications(opcode) == (kind, work)


@pytest.mark.parametrize("opcode", ["IMMA.12345.S8.S8", "OMMA.16864.F32", "TCGEN5MMA.64x64"])
def test_an_unknown_matrix_instruction_is_an_error_that_names_it(opcode: str) -> None:
    with pytest.raises(sass.UnknownInstructionError, match=opcode.split(".")[0]):
        sass.hot_loop(
            f".L_x_1:\n        /*0010*/                   {opcode} R4, R8, R12, R4 ;\n        "
            f"/*0020*/    BRA `(.L_x_1) ;"
        )


def test_an_unclassified_opcode_takes_an_issue_slot_and_is_named() -> None:
    loop = sass.hot_loop(NESTED.replace("FFMA", "XYZZY"))
    assert loop is not None
    assert loop.unclassified == ["XYZZY"]
    assert loop.cycles(sass.CARDS["sm_86"], warps=8)["issue"] == 8.0


@pytest.mark.parametrize(
    ("opcode", "moved"),
    [
        ("LDSM.16.M88.4", 512),
        ("LDSM.16.M88.2", 256),
        ("LDS.128", 512),
        ("LDS.64", 256),
        ("STS", 128),
        ("SHFL.BFLY", 128),
        ("LDGSTS.E.BYPASS.128", 512),
    ],
)
def test_bytes_of_shared_memory(opcode: str, moved: int) -> None:
    assert sass.shared_bytes(opcode) == moved


def test_a_wgmma_reads_its_first_operand_from_where_it_lies() -> None:
    assert (
        sass.wgmma_bytes("IGMMA.64x128x32.S8.S8", "R24, R8, gdesc[UR4], R24, gsb0") == 128 * 32 / 4
    )
    assert (
        sass.wgmma_bytes("IGMMA.64x128x32.S8.S8", "R24, gdesc[UR8], R24, gsb0")
        == (128 + 64) * 32 / 4
    )
    assert (
        sass.wgmma_bytes("HGMMA.64x128x16.F32", "R24, gdesc[UR8], R24") == (128 + 64) * 16 * 2 / 4
    )


def test_cards_have_the_peaks_of_their_data_sheets() -> None:
    peaks = {arch: round(card.tops("int8")) for arch, card in sass.CARDS.items()}
    assert peaks == {"sm_80": 624, "sm_86": 285, "sm_89": 661, "sm_90": 1979, "sm_120": 838}


def test_the_document_holds_the_committed_table() -> None:
    text = static_bound.DOCUMENT.read_text(encoding="utf-8")
    found = static_bound.read_table()
    assert static_bound.section(found) in text
    assert {one.arch for one in found} == set(sass.ARCHES)
    for arch in sass.ARCHES:
        names = {one.kernel for one in found if one.arch == arch}
        assert {
            "attention int8",
            "linear int8 store",
            static_bound.SAGE,
            "yardstick bf16 flash",
            "yardstick bf16 product",
        } <= names
        assert any(name.startswith("comfy-kitchen") for name in names)
        assert not [one for one in found if one.unclassified]


def test_measured_rates_of_committed_rows_stand_in_the_table(tmp_path: Path) -> None:
    row = {
        "event": "row",
        "gpu": "NVIDIA H100 80GB HBM3",
        "rate": 512.0,
        "call": "1",
        "identity": "i",
        "step": "speed",
    }
    units = (
        "attention 32760 queries, 32760 keys, 40 heads, lowvram int8, PV int8",
        "linear q M=32760 N=5120 K=5120, lowvram fp8",
    )
    lines = [json.dumps(row | {"unit": unit}) for unit in units] + [
        json.dumps(row | {"event": "end", "unit": "linear q"})
    ]
    (tmp_path / "rows-h100.jsonl").write_text("\n".join(lines))
    found = static_bound.measured_rates(tmp_path)
    assert found == {("attention int8", "sm_90"): 512.0, ("linear fp8 store", "sm_90"): 512.0}
    assert "| 512 |" in static_bound.table(
        [one for one in static_bound.read_table() if one.arch == "sm_90"], found
    )


def test_the_gate_names_what_fell_and_what_is_gone() -> None:
    committed = static_bound.read_table()
    lower = [
        dataclasses.replace(one, serial=one.serial - 0.021)
        if one.key == ("attention int8", "sm_90")
        else one
        for one in committed
    ]
    (said,) = static_bound.fallen(committed, lower)
    assert said.startswith("attention int8 sm_90: serial bound")
    gone = [one for one in committed if one.key != ("linear fp8 store", "sm_89")]
    assert static_bound.fallen(committed, gone) == ["linear fp8 store sm_89: not compiled any more"]
    slightly = [
        dataclasses.replace(one, serial=one.serial - 0.015, ideal=one.ideal - 0.015)
        for one in committed
    ]
    assert static_bound.fallen(committed, slightly) == []
    assert (
        len(
            static_bound.risen(
                committed,
                [dataclasses.replace(one, ideal=one.ideal + 0.03) for one in committed[:2]],
            )
        )
        == 2
    )
    peers = [one for one in committed if one.ours]
    assert static_bound.fallen(committed, peers) == [], (
        "a peer that is not installed is no loss of ours"
    )


def test_a_machine_that_lacks_triton_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static_bound, "find_spec", lambda name: None)
    assert static_bound.main([]) == 1
    assert capsys.readouterr().err == "static_bound: not installed: torch, triton\n"


triton = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux", reason="triton compiles on Linux alone"
)


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (folder, folder / "kernels", folder / "quantize")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "-m", "scripts.static_bound", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.slow
@triton
def test_no_bound_of_ours_has_fallen() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 fallen" in done.stdout


@pytest.mark.slow
@triton
def test_the_gate_sees_a_worse_loop(tmp_path: Path) -> None:
    """Compile a copy of the code with one more logarithm and exponential per output."""
    for name in ("scripts", "kernels", "lowvram", "quantize"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    (tmp_path / "docs" / "benchmarks" / "static.csv").write_bytes(static_bound.TABLE.read_bytes())
    kernel = tmp_path / "kernels" / "lowvram_kernels" / "attention_int8_triton.py"
    text = kernel.read_text(encoding="utf-8")
    line = "product.to(tl.float32, bitcast=True)"
    assert text.count(line) == 1, "the line that this test makes worse"
    kernel.write_text(text.replace(line, f"tl.exp2(tl.log2({line}))"), encoding="utf-8")
    done = run("--check", "--arch", "sm_86", "--kernel", "attention int8", folder=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "fallen: attention int8 sm_86: serial bound" in done.stderr


def test_rows_round_trip(tmp_path: Path) -> None:
    found = static_bound.read_table()
    static_bound.write_table(found, tmp_path / "static.csv")
    assert static_bound.read_table(tmp_path / "static.csv") == found
    assert isinstance(found[0], Bound)
