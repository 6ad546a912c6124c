"""What only a GPU's machine has, with stand-ins: the device's facts, the link, Nsight Compute."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.bench import machine as bench_machine
from scripts.bench import ncu as bench_ncu
from scripts.bench import speed as bench_speed
from scripts.bench import steps as bench_steps
from scripts.bench.results import Results
from scripts.bench.steps import Context, LeftOut


def context_of(folder: Path, rehearse: bool = True) -> Context:
    command = [sys.executable, "-c", "pass"]
    return Context(
        Results(folder, "now"),
        folder,
        folder / "work",
        time.monotonic() + 60,
        rehearse,
        "I",
        {},
        command,
    )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_a_gpu_is_described(cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_machine, "driver", lambda: "580.1, 1980 MHz, 700 W")
    versions, tools, device = bench_machine.facts(context_of(tmp_path, rehearse=False))
    assert versions["torch"] == torch.__version__
    assert versions["sageattention"] == "not installed"
    assert set(tools) == {"name", "ncu", "nsys", "cc", "gcc", "ptxas"}
    assert (device["capability"], device["sms"], device["l2_mb"], device["free_gb"]) == (
        "9.0",
        132,
        50.0,
        70.0,
    )
    assert "580.1" in device["driver"]


@pytest.mark.parametrize(
    ("code", "said", "driver"),
    [(0, "580.1, 1980 MHz, 700.00 W\n", "580.1, 1980 MHz, 700.00 W"), (9, "", "unknown")],
)
def test_the_driver_is_asked_and_nothing_else(
    code: int, said: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, code, said)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    assert bench_machine.driver() == driver
    assert [part.split("=")[0] for part in asked[0]] == ["nvidia-smi", "--query-gpu", "--format"]


def test_the_link_is_measured_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(bench_machine, "LINK_BYTES", 1000)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, **_: empty(size, dtype=dtype))
    monkeypatch.setattr(
        bench_machine, "measure", lambda run, repeats: (run(0), (1e-3, 1e-3, 1e-3))[1]
    )
    there, back = bench_machine.link(context_of(tmp_path, rehearse=False))
    assert there == {"name": "link host to device", "rate": 1.0, "unit": "GB/s"}
    assert back["name"] == "link device to host"


def test_a_fault_of_the_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    assert bench_steps.device_is_lost("cuda")
    bench_steps.release("cuda")
    assert not bench_steps.device_is_lost("cpu")


ROWS = [
    {"op": "linear q", "shape": "M=8", "provider": "lowvram int8", "median_ms": 1.0},
    {"op": "linear o +=", "shape": "M=8", "provider": "lowvram int8", "median_ms": 2.0},
    {"op": "linear o +=", "shape": "M=8", "provider": "torch bf16", "median_ms": 9.0},
    {"op": "attention", "shape": "8 keys", "provider": "lowvram int8, PV int8", "median_ms": 5.0},
    {"op": "attention", "shape": "8 keys", "provider": "lowvram int8, PV fp8", "median_ms": 7.0},
]
# A line of the profiled program, then ncu's own and its CSV.
NCU = """#!/bin/sh
echo "==PROF== Profiling attention_kernel"
echo "a line of the program"
echo '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","attention_kernel","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","61.5"'
echo '"0","attention_kernel","Occupancy","Achieved Occupancy","%","12.4"'
echo "$@" > "{folder}/arguments"
exit {code}
"""


def fake_ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0, text: str = NCU) -> None:
    path = folder / "ncu"
    path.write_text(text.format(folder=folder, code=code))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_slowest_attention_and_linear_are_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowest = bench_ncu.slowest_of(ROWS)
    assert [(row["op"], row["median_ms"]) for row in slowest] == [
        ("attention", 5.0),
        ("linear o +=", 2.0),
    ]
    fake_ncu(tmp_path, monkeypatch)
    (row,) = bench_ncu.profiled(slowest[0], context_of(tmp_path))
    assert row["metrics"] == {"Compute (SM) Throughput": "61.5 %", "Achieved Occupancy": "12.4 %"}
    arguments = (tmp_path / "arguments").read_text()
    assert "--kernel-name regex:attention_kernel" in arguments
    assert "--launch attention 8 keys, lowvram int8, PV int8" in arguments


def test_an_ncu_that_may_not_read_counters_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ncu(
        tmp_path,
        monkeypatch,
        1,
        "#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - The user does not have "
        "permission'\nexit {code}\n",
    )
    with pytest.raises(LeftOut, match="ERR_NVGPUCTRPERM"):
        list(bench_ncu.profiled(ROWS[3], context_of(tmp_path)))


def test_an_ncu_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ncu(tmp_path, monkeypatch, 3)
    with pytest.raises(RuntimeError, match="ended with 3"):
        list(bench_ncu.profiled(ROWS[3], context_of(tmp_path)))


def test_without_rows_no_kernel_is_known_to_be_slow(tmp_path: Path) -> None:
    (unit,) = bench_ncu.units(context_of(tmp_path))
    with pytest.raises(LeftOut):
        list(unit.run())


def test_peers_that_are_not_installed_are_named(tmp_path: Path) -> None:
    absent = [unit for unit in bench_speed.speed_units(context_of(tmp_path)) if unit.needs]
    assert {unit.needs for unit in absent} <= {("sageattention",), ("comfy_kitchen",)}
    assert all(bench_steps.missing_packages(unit.needs) for unit in absent)


def test_true_shapes_are_those_of_a14b(tmp_path: Path) -> None:
    context = context_of(tmp_path, rehearse=False)
    shapes = bench_speed.Shapes.of(context)
    assert (shapes.device, shapes.tokens, shapes.heads, shapes.dim, shapes.ffn) == (
        "cuda",
        32760,
        40,
        5120,
        13824,
    )
    assert shapes.linears["ffn.2 +="] == (5120, 13824)
    warm = bench_speed.Shapes.of(context, warm=True)
    assert warm.tokens % 16 == shapes.tokens % 16 == 8, "the compiler may count on nothing else"
    assert all(tokens % 64 for tokens in (warm.tokens, shapes.tokens)), "keys that fill no tile"
    assert warm.linears == shapes.linears
