"""The check of the kernels: in processes of its own, remembered per GPU and versions, and what
follows where a kernel is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_kernels import check, constraints, dispatch, tuning
from lowvram_kernels.check import Check, is_occupied, problems
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.ops import OPS

from lowvram.doctor import kernel_check
from lowvram.doctor.kernel_check import KernelKey, KernelReport
from lowvram.doctor.report import checked_kernels, doctor_report
from lowvram.hardware.machine import Gpu, Machine
from lowvram.planner.phases import Host

GPU = torch.device("cuda", 0)
KEY = KernelKey("RTX 4090", "8.9", "driver 1", "2.13.0", "3.7.1", "0123456789abcdef")
GOOD = [Check(op, "int8") for op in OPS]
WRONG = [
    replace(check, problem="out: relative error 3.1e-02") if check.op == "attention_int8" else check
    for check in GOOD
]


@pytest.fixture(autouse=True)
def trusting() -> Any:
    yield
    dispatch.distrust({})


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[Check]]:
    """A GPU whose kernels give these results, one list a check; the cache lies in `tmp_path`."""
    results: list[list[Check]] = []
    monkeypatch.setattr(kernel_check, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kernel_check, "kernel_key", lambda device: KEY)
    monkeypatch.setattr(kernel_check, "check_in_processes", lambda device: results.pop(0))
    monkeypatch.setattr(constraints, "refused_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("LOWVRAM_BACKEND", raising=False)
    return results


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_the_references_take_every_call_of_an_architectures_check(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that the op itself refuses would be reported as a wrong kernel."""
    monkeypatch.setattr(check, "architecture", lambda device: arch)
    for op in ("quantize_values", "attention_int8"):
        made = check.calls(op, torch.device("cpu"))
        assert {label.split(",")[0] for label in made} <= set(tuning.pv_choices(arch))
        for make in made.values():
            make().run("reference")


def test_a_gpu_is_checked_once(
    checked: list[list[Check]], caplog: pytest.LogCaptureFixture
) -> None:
    checked.append(GOOD)
    first, second = kernel_check.trust_kernels(GPU), kernel_check.trust_kernels(GPU)
    assert first == KernelReport(tuple(GOOD), True)
    assert second == KernelReport(tuple(GOOD), False)
    assert first.summary == "7 of 7 agree with their references"
    assert caplog.messages == [
        "checking the kernels on RTX 4090: takes seconds, or up to a minute if they must be "
        "compiled; done once"
    ]
    assert dispatch.distrusted() == ()
    checked.append(WRONG)
    refreshed = kernel_check.trust_kernels(GPU, refresh=True)
    assert refreshed is not None
    assert refreshed.checked_now


@pytest.mark.parametrize("part", list(KernelKey.__dataclass_fields__))
def test_another_gpu_driver_torch_triton_or_kernel_is_checked_anew(
    part: str, checked: list[list[Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked += [GOOD, WRONG]
    kernel_check.trust_kernels(GPU)
    monkeypatch.setattr(
        kernel_check, "kernel_key", lambda device: replace(KEY, **{part: "another"})
    )
    report = kernel_check.trust_kernels(GPU)
    assert report is not None
    assert report.checked_now


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "key": {}, "checks": [{"op": "x"}]}'],
)
def test_a_damaged_memory_is_made_anew(
    content: str, checked: list[list[Check]], tmp_path: Path
) -> None:
    checked += [GOOD]
    (tmp_path / KEY.file_name).write_text(content)
    report = kernel_check.trust_kernels(GPU)
    assert report is not None
    assert report.checked_now
    assert json.loads((tmp_path / KEY.file_name).read_text())["checks"][0] == {
        "op": next(iter(OPS)), "label": "int8", "problem": "", "unchecked": ""
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_costs_a_warning(
    checked: list[list[Check]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernel_check, "cache_folder", lambda: tmp_path / "file")
    checked.append(GOOD)
    report = kernel_check.trust_kernels(GPU)
    assert report is not None
    assert "could not cache the check of the kernels" in caplog.messages[-1]


def test_a_wrong_kernel_runs_on_its_reference_by_name(
    checked: list[list[Check]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process and the next; forced, it is refused; the other ops keep their kernels; plans
    count the reference.
    """
    checked.append(WRONG)
    for _ in range(2):
        dispatch.distrust({})
        report = kernel_check.trust_kernels(GPU)
        assert report is not None
        assert report.problems == {"attention_int8": "int8: out: relative error 3.1e-02"}
        assert dispatch.distrusted() == ("attention_int8",)
        assert "attention_int8 runs as its slower torch reference" in caplog.messages[-1]
    monkeypatch.setattr(constraints, "wrong_device", lambda tensor: None)
    monkeypatch.setattr(constraints, "scattered", lambda tensors: None)
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(dispatch, "Tensor", SimpleNamespace)
    assert dispatch.choose("attention_int8", on_gpu) is OPS["attention_int8"].reference
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    with pytest.raises(
        UnsupportedOpError,
        match=r"its kernel disagrees with its reference on this GPU \(int8: out: relative error",
    ):
        dispatch.choose("attention_int8", on_gpu)


def test_what_was_not_compared_is_said_and_not_remembered(
    checked: list[list[Check]], tmp_path: Path
) -> None:
    checked += [
        [
            Check(op, "int8", unchecked="CUDA out of memory")
            if op == "quantize_rows"
            else Check(op, "int8")
            for op in OPS
        ]
    ]
    report = kernel_check.trust_kernels(GPU)
    assert report is not None
    assert (
        report.summary
        == "6 of 7 agree with their references; quantize_rows was not checked (CUDA out of memory)"
    )
    assert dispatch.distrusted() == ()
    assert not list(tmp_path.iterdir())


def test_where_no_kernel_runs_nothing_is_checked(
    checked: list[list[Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_check.trust_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(
        constraints, "refused_gpu", lambda device: "the triton package is not installed"
    )
    assert kernel_check.trust_kernels(GPU) is None
    monkeypatch.setattr(constraints, "refused_gpu", lambda device: None)
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    assert kernel_check.trust_kernels(GPU) is None


@pytest.mark.parametrize(("backend", "checks"), [("", 1), ("triton", 0), ("reference", 0)])
def test_a_run_is_preceded_by_a_check_unless_a_backend_is_forced(
    backend: str, checks: int, checked: list[list[Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked.append(GOOD)
    monkeypatch.setenv("LOWVRAM_BACKEND", backend)
    kernel_check.trust_kernels_before_a_run(GPU)
    assert len(checked) == 1 - checks


def machine(**changes: Any) -> Machine:
    gpu = Gpu("RTX 4090", 24 << 30, 20 << 30, (8, 9), "sm_89", 20e9)
    values: dict[str, Any] = {
        "system": "Linux x86_64",
        "python": "3.11",
        "cpu_count": 8,
        "ram_total_bytes": 32 << 30,
        "ram_free_bytes": 20 << 30,
        "ram_limited_by": "machine",
        "gpu": gpu,
        "gpu_reason": "",
        "disk_free_bytes": 1 << 40,
        "disk_read_bytes_s": 3e9,
        "triton_works": True,
        "triton_reason": "",
        "versions": {"torch": "2.13.0", "triton": "3.7.1"},
    }
    return Machine(**{**values, **changes})


@pytest.mark.parametrize(
    ("report", "status", "detail", "advice"),
    [
        (
            KernelReport(tuple(GOOD), True),
            "ok",
            "7 of 7 agree with their references; checked now",
            "",
        ),
        (
            KernelReport(tuple(GOOD), False),
            "ok",
            "7 of 7 agree with their references; checked before",
            "--refresh",
        ),
        (
            KernelReport(tuple(WRONG), False),
            "warn",
            "6 of 7 agree with their references; attention_int8 does not (int8: out: rel",
            "driver",
        ),
        (
            KernelReport((*GOOD[:6], Check("attention_int8", "", unchecked="busy")), True),
            "warn",
            "was not checked (busy)",
            "close other programs that use the GPU",
        ),
        (None, "ok", "not needed because no kernel can run", ""),
    ],
)
def test_the_doctor_says_how_many_agree(
    report: KernelReport | None, status: str, detail: str, advice: str
) -> None:
    found = doctor_report(Path(), machine(), None, report)
    (finding,) = [finding for finding in found["findings"] if finding["name"] == "kernels"]
    assert finding["status"] == status
    assert detail in finding["detail"]
    assert advice in finding["advice"]
    assert len(found["kernels"]) == (len(report.checks) if report else 0)
    assert json.dumps(found)


def test_the_doctor_checks_where_kernels_can_run(checked: list[list[Check]]) -> None:
    assert checked_kernels(machine(gpu=None)) is None
    assert checked_kernels(machine(triton_works=False)) is None
    checked.append(GOOD)
    report = checked_kernels(machine())
    assert report is not None
    assert report.checked_now


def test_the_first_problem_of_an_op_is_named() -> None:
    assert problems(
        [
            Check("a", "x"),
            Check("a", "y", "bad"),
            Check("a", "z", "worse"),
            Check("b", "x", unchecked="busy"),
        ]
    ) == {"a": "y: bad"}
    assert is_occupied("CUDA error: all CUDA-capable devices are busy or unavailable")
    assert not is_occupied("CUDA error: an illegal memory access was encountered")


def test_plans_count_the_references_of_wrong_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lowvram import pipeline

    monkeypatch.setattr(pipeline, "refused_gpu", lambda device: None)
    monkeypatch.setattr(
        Host, "of", classmethod(lambda cls, kind, process: Host(True, 1 << 29, process, False))
    )
    (tmp_path / "lowvram.json").write_text("{}")
    store: Any = SimpleNamespace(format="int8", path=tmp_path)
    assert not pipeline.Pipeline(store, GPU, 1, 1, 1).host.references
    dispatch.distrust({"attention_int8": "int8: wrong"})
    assert pipeline.Pipeline(store, GPU, 1, 1, 1).host.references


# Runs instead of `lowvram_kernels.check`.
STUB = """
import json, os, sys, time
device, *ops = sys.argv[1:]
for op in ops:
    print(json.dumps({"begin": op}), flush=True)
    if op == "dies":
        os.kill(os.getpid(), 11)
    if op == "hangs":
        time.sleep(60)
    if op == "busy":
        sys.exit("CUDA error: all CUDA-capable devices are busy or unavailable")
    wrong = "out: 3 elements differ" if op in ("wrong", "loses") else ""
    print(json.dumps({"op": op, "label": "int8", "problem": wrong, "unchecked": ""}), flush=True)
    if op == "loses":
        sys.exit(3)
"""


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        (["a", "b"], {}),
        (["a", "wrong", "b"], {"wrong": "int8: out: 3 elements differ"}),
        (["a", "dies", "b", "c"], {"dies": "a call: its process ended with -11"}),
        (
            ["dies", "hangs", "b"],
            {
                "dies": "a call: its process ended with -11",
                "hangs": "a call: it hangs: no answer within 1 s",
            },
        ),
        (["loses", "b"], {"loses": "int8: out: 3 elements differ"}),
    ],
)
def test_a_kernel_that_ends_its_process_costs_itself_alone(
    ops: list[str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_stub(ops, monkeypatch, tmp_path)
    assert problems(found) == expected
    assert {check.op for check in found} == set(ops)


def test_a_device_that_others_use_is_no_fault_of_a_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = KernelReport(tuple(run_stub(["a", "busy", "b"], monkeypatch, tmp_path)), True)
    assert report.problems == {}
    assert set(report.unchecked) == {"busy", "b"}


def run_stub(ops: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Check]:
    (folder / "stub.py").write_text(STUB)
    run = subprocess.run
    monkeypatch.setattr(kernel_check, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(kernel_check, "MOST_PROCESSES", 1)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **more: run([command[0], str(folder / "stub.py"), *command[3:]], **more),
    )
    return kernel_check.check_in_processes("cuda:0", ops)


@pytest.mark.slow
def test_all_kernels_agree_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, and one by name where it is wrong."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = KernelReport(tuple(kernel_check.check_in_processes("cpu")), True)
    assert report.summary == "7 of 7 agree with their references"
    assert list(dict.fromkeys(check.op for check in report.checks)) == list(OPS)


WRONG_KERNELS = """
import torch
from lowvram_kernels import check, dispatch, ops

def wrong(*arguments, **options):
    real(module, name)(*arguments, **options)
    options.get("out_scale", options["out"]).mul_(1.01)

def raises(*arguments, **options):
    raise RuntimeError("no kernel image is available\\nmore")

real, names = dispatch._wrapper, list(ops.OPS)
for name, other in zip(names, names[1:] + names[:1]):
    module, plant = ops.OPS[name].triton_module, raises if name == "rms_rope_quantize" else wrong
    dispatch._wrapper = lambda module, called: plant if called == name else real(module, called)
    print(name, check.problems(check.checks(torch.device("cpu"), (name, other))))
"""


@pytest.mark.slow
def test_a_wrong_kernel_is_the_one_that_is_named() -> None:
    """Each in turn, beside one that is right."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WRONG_KERNELS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(lines) == list(OPS)
    for op, line in lines.items():
        assert line.startswith(f"{{'{op}': "), line
        assert line.count("': ") == 1, line
    assert "does not run: no kernel image is available" in lines["rms_rope_quantize"]
