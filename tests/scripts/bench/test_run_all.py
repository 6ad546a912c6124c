"""`bench all`: a step that fails in whatever way costs itself alone, nothing measured is lost,
and the last page names all of it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import run_all as bench_all
from scripts.bench import steps as bench_steps
from scripts.bench.results import Results, ResultsNotWritten, commit_of, problem_of, source_digest
from scripts.bench.run_all import DEVICE_LOST, FAILED, LEFT_OUT, NO_DEVICE, OUT_OF_TIME, Step
from scripts.bench.steps import Context, LeftOut, OutOfTime, Row, Unit

ROOT = Path(__file__).parents[3]
IDENTITY = "machine | torch | triton | source"


def context_of(
    folder: Path, seconds: float = 60.0, call: str = "now", earlier: tuple[Path, ...] = ()
) -> Context:
    results = Results(folder, call, earlier)
    return Context(
        results,
        folder,
        folder / "work",
        time.monotonic() + seconds,
        True,
        IDENTITY,
        {"gpu": "none"},
        [],
    )


def rows(*values: Row) -> Callable[[], Iterator[Row]]:
    return lambda: iter(values)


def failing(error: BaseException) -> Callable[[], Iterator[Row]]:
    def run() -> Iterator[Row]:
        yield {"name": "measured before the failure"}
        raise error

    return run


STEP = Step("speed", "a step", 10, 1)


def test_a_failing_unit_costs_itself_alone_and_keeps_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path)
    units = [
        Unit("one", rows({"name": "a"})),
        Unit("bad", failing(RuntimeError("boom\nmore"))),
        Unit("two", rows({"name": "b"})),
    ]
    assert bench_steps.run_units(STEP, units, context) == FAILED
    assert [row["name"] for row in context.rows("speed")] == [
        "a",
        "measured before the failure",
        "b",
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 failed: bad: RuntimeError: boom"


def test_what_cannot_run_is_left_out_and_that_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path)
    units = [
        Unit("peer", failing(LeftOut("no backend"))),
        Unit("lacks", rows({"name": "a"}), ("no_such_package",)),
        Unit("one", rows({})),
    ]
    assert bench_steps.run_units(STEP, units, context) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "left out: peer: no backend; lacks: not installed: no_such_package"
    )
    assert bench_steps.run_units(STEP, units[:2], context_of(tmp_path)) == LEFT_OUT


def test_a_later_call_measures_what_an_earlier_one_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from another folder; what failed or ran out of time is tried again, what another machine
    or other code measured counts not.
    """
    ran: list[str] = []

    def unit(name: str, error: BaseException | None = None) -> Unit:
        def run() -> Iterator[Row]:
            ran.append(name)
            yield {"name": name}
            if error:
                raise error

        return Unit(name, run)

    (tmp_path / "later").mkdir()
    first = [
        unit("done"),
        unit("failed", ValueError("no")),
        unit("slow", OutOfTime()),
        unit("last"),
    ]
    assert bench_steps.run_units(STEP, first, context_of(tmp_path, call="first")) == FAILED
    second = [unit(one.name) for one in first]
    later = context_of(tmp_path / "later", call="second", earlier=(tmp_path,))
    assert bench_steps.run_units(STEP, second, later) == 0
    assert ran == ["done", "failed", "slow", "last", "failed", "slow"]
    assert "done: measured before" in capsys.readouterr().out
    assert sorted(row["name"] for row in later.rows("speed")) == ["done", "failed", "last", "slow"]
    other = context_of(tmp_path / "later", call="third", earlier=(tmp_path,))
    other.identity = "another machine"
    assert bench_steps.run_units(STEP, second, other) == 0
    assert ran[6:] == [one.name for one in first]


def test_units_stop_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path)

    def run() -> Iterator[Row]:
        yield {"name": "first"}
        context.deadline = time.monotonic() - 1
        context.require_time()
        yield {"name": "second"}

    assert (
        bench_steps.run_units(STEP, [Unit("long", run), Unit("late", rows({}))], context)
        == OUT_OF_TIME
    )
    assert [row["name"] for row in context.rows("speed")] == ["first"]
    assert capsys.readouterr().out.splitlines()[-1] == "no time for long; late"


def test_a_lost_device_ends_its_process_and_names_the_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, lost = context_of(tmp_path), [False]

    def run() -> Iterator[Row]:
        lost[0] = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield {}

    monkeypatch.setattr(bench_steps, "device_is_lost", lambda device: lost[0])
    assert (
        bench_steps.run_units(STEP, [Unit("breaks it", run), Unit("next", rows({}))], context)
        == DEVICE_LOST
    )
    assert "illegal memory access" in context.results.failed("speed")["breaks it"]
    lost[0] = False  # in a new process
    assert (
        bench_steps.run_units(
            STEP, [Unit("breaks it", run), Unit("next", rows({"name": "a"}))], context
        )
        == FAILED
    )
    assert [row["name"] for row in context.rows("speed")] == ["a"]


def test_a_torn_line_and_foreign_lines_lose_no_other(tmp_path: Path) -> None:
    results = Results(tmp_path, "now")
    record = {"step": "speed", "unit": "one", "identity": IDENTITY, "event": "row"}
    results.append({**record, "name": "a"})
    with results.path.open("ab") as file:
        file.write(b'{"step": "speed", "un')
    results.append({**record, "name": "b"})
    with results.path.open("ab") as file:
        file.write(b'[1, 2]\n{"event": "row"}\n\xff\n')
    results.append({**record, "name": "c"})
    assert [row["name"] for row in results.rows("speed", IDENTITY)] == ["a", "b", "c"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsNotWritten, match=r"rows\.jsonl cannot be written: the disk is full"):
        Results(tmp_path, "now").append({"event": "row"})


def test_problems_are_one_line() -> None:
    assert problem_of(ValueError("one\ntwo")) == "ValueError: one"
    assert problem_of(KeyError()) == "KeyError"


def test_the_code_that_is_measured_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "one.py").write_text("a = 1")
    before = source_digest(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "two.py").write_text("a = 1")
    assert source_digest(tmp_path) == before
    (tmp_path / "kernels" / "one.py").write_text("a = 2")
    assert source_digest(tmp_path) != before
    assert commit_of(tmp_path / "nowhere") == "unknown"


# --- the command, with small programs in the place of the steps
# -----------------------------------------------------------------------

STUB = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from scripts.bench.results import Results, ResultsNotWritten
results = Results(Path({out!r}), {call!r})
record = {{"step": {step!r}, "identity": {identity!r}}}
facts = {{"gpu": "G", "torch": "T", "triton": "R", "commit": "C", "source": "S"}}
def unit(name, body=None):
    if results.state({step!r}, name):
        return
    results.append({{**record, "unit": name, "event": "begin"}})
    if body:
        body()
    results.append({{**record, "unit": name, "event": "row", "name": name, **facts}})
    results.append({{**record, "unit": name, "event": "end", "status": "done", "reason": ""}})
{body}
"""
GOOD = "unit('a'); unit('b'); print('all of it')"
NAMES = [step.name for step in bench_all.STEPS]


def run_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bodies: dict[str, str], *arguments: str
) -> tuple[int, str]:
    """(exit code, the page) of the command whose steps run `bodies`, `GOOD` where none is named."""
    out = tmp_path / "out"

    def command(run: Any, step: Step, seconds: float) -> list[str]:
        values = {
            "root": str(ROOT),
            "out": str(out),
            "call": run.results.call,
            "step": step.name,
            "identity": IDENTITY,
        }
        return [sys.executable, "-c", STUB.format(**values, body=bodies.get(step.name, GOOD))]

    monkeypatch.setattr(bench_all.Run, "_command", command)
    monkeypatch.setattr(bench_all, "GRACE_S", 0.2)
    monkeypatch.setattr(bench_all, "KILL_AFTER_S", 0.5)
    code = bench_all.main(["--out", str(out), "--work", str(tmp_path / "work"), *arguments])
    return code, (out / "page.md").read_text() if (out / "page.md").exists() else ""


def line_of(page: str, step: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {step}: "))


FAULTS = {
    "kernel wrong": (
        "unit('a'); print('1 of 2 failed: check: relative error'); sys.exit(1)",
        "failed",
        "relative error",
    ),
    "package missing": (
        "print('not installed: diffusers'); sys.exit(3)",
        "left out",
        "not installed: diffusers",
    ),
    "no device": ("print('no CUDA device'); sys.exit(5)", "no device", "no CUDA device"),
    "too slow": (
        "unit('a'); unit('hangs', lambda: time.sleep(60))",
        "out of time",
        "hangs: stopped after",
    ),
    "killed": (
        "unit('a'); unit('dies', lambda: os.kill(os.getpid(), 9)); unit('b')",
        "failed",
        "dies: was killed (SIGKILL)",
    ),
    "disk full": (
        "unit('a'); print('rows.jsonl cannot be written: the disk is full'); sys.exit(1)",
        "failed",
        "the disk is full",
    ),
    "syntax error": ("import no_such_module", "failed", "No module named 'no_such_module'"),
    "dies at once": ("os.kill(os.getpid(), 11)", "failed", "was killed (SIGSEGV)"),
}


@pytest.mark.parametrize("step", NAMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_costs_its_step_alone_and_is_named_on_the_last_page(
    fault: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, status, said = FAULTS[fault]
    seconds = 9.0 if fault == "too slow" else 90.0
    monkeypatch.setattr(
        bench_all,
        "STEPS",
        tuple(bench_all.Step(one.name, one.title, 60, 0.5) for one in bench_all.STEPS),
    )
    chosen = [step, next(name for name in NAMES if name != step)]
    _, page = run_all(
        tmp_path, monkeypatch, {step: body}, "--seconds", str(seconds), "--only", *chosen
    )
    assert f"| {status} |" in line_of(page, step)
    assert said in line_of(page, step)
    assert "| done |" in line_of(page, chosen[1])
    assert "2 rows" in line_of(page, chosen[1])


def test_a_step_goes_on_in_a_new_process_without_the_unit_that_it_died_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "unit('a'); unit('dies', lambda: os.kill(os.getpid(), 9)); unit('b'); print('all of it')"
    code, page = run_all(tmp_path, monkeypatch, {"speed": body}, "--only", "speed")
    assert code == 1
    assert "2 rows; dies: was killed (SIGKILL)" in line_of(page, "speed")


def test_later_steps_are_dropped_when_no_time_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_all,
        "STEPS",
        tuple(bench_all.Step(one.name, one.title, 60, 2.0) for one in bench_all.STEPS),
    )
    begin = time.monotonic()
    code, page = run_all(
        tmp_path,
        monkeypatch,
        dict.fromkeys(NAMES, "unit('hangs', lambda: time.sleep(60))"),
        "--seconds",
        "5",
    )
    assert time.monotonic() - begin < 12
    assert "| out of time |" in line_of(page, NAMES[0])
    assert "| dropped | 0 | 0 rows; no time was left" in line_of(page, NAMES[-1])
    assert code == 0


def test_ctrl_c_ends_the_step_and_still_writes_the_page(tmp_path: Path, hears_ctrl_c: None) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.bench import run_all as bench_all
bench_all.Run._command = lambda run, step, seconds: [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
sys.exit(bench_all.main(["--out", {str(tmp_path)!r}, "--work", {str(tmp_path / "work")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "begun" not in process.stdout.readline():
        pass
    process.send_signal(2)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "# `bench all`" in said
    assert "| machine: what machine this is, and its measured peaks | interrupted |" in said
    assert (tmp_path / "page.md").exists()


def test_what_a_step_leaves_behind_is_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pid"
    body = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pids)!r}, "w").write(str(child.pid))
unit('a'); print('all of it')
"""
    run_all(tmp_path, monkeypatch, {"demo": body}, "--only", "demo")
    begin = time.monotonic()
    while runs(pids.read_text()):
        assert time.monotonic() - begin < 10
        time.sleep(0.05)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_relative_folder_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = bench_all.parse(["--out", "out", "--work", "work", "--earlier", "one", "two"])
    assert (options.out, options.work) == (tmp_path / "out", tmp_path / "work")
    assert options.earlier == [tmp_path / "one", tmp_path / "two"]


def test_a_process_that_dies_before_its_unit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a step whose units run in processes of their own."""
    context = context_of(tmp_path)
    context.command = [sys.executable, "-c", "raise SystemExit(7)"]
    step = Step("correct", "a step", 10, 1, parallel=True)
    assert bench_steps.run_units(step, [Unit("one", rows({}))], context) == FAILED
    assert (
        capsys.readouterr().out.splitlines()[-1] == "1 of 1 failed: one: its process ended with 7"
    )


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert bench_all.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "bench all: cannot make" in capsys.readouterr().err


def test_shares_are_the_time_of_one_call() -> None:
    assert sum(step.seconds for step in bench_all.STEPS) == bench_all.TOTAL_S == 540
    assert all(step.least_s <= step.seconds for step in bench_all.STEPS)
    assert set(bench_steps.UNITS) == set(NAMES)
    assert json.dumps([step.needs for step in bench_all.STEPS])
    assert (NO_DEVICE, DEVICE_LOST) == (5, 6)
