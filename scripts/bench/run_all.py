"""`bench all`: the steps of the whole benchmark, each in a process of its own with its share of
the time, and one page at the end.

A step that fails, hangs, is killed or lacks a package costs itself alone. Where a process dies, its
step goes on in a new one without the unit that it died of. Imports neither torch nor anything of
lowvram.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench import ROOT
from scripts.bench.page import page
from scripts.bench.results import Results, ResultsNotWritten, commit_of, problem_of

# How a process of a step ends, beside 0: what it does not say with these it died of.
FAILED, LEFT_OUT, OUT_OF_TIME, NO_DEVICE, DEVICE_LOST = 1, 3, 4, 5, 6
STATUS = {
    0: "done",
    FAILED: "failed",
    LEFT_OUT: "left out",
    OUT_OF_TIME: "out of time",
    NO_DEVICE: "no device",
}
WHOLE = "all of it"  # what a step says where nothing is missing
RESTARTS = 3
GRACE_S, KILL_AFTER_S = 5.0, 3.0
LAST_LINES = 40
PAGE_S = 3.0  # kept back for the page


@dataclass(frozen=True)
class Step:
    """seconds: its share of `TOTAL_S`; least_s: with less it is not begun; needs: packages beside
    torch and numpy.

    interpreted: in a rehearsal its kernels run in Triton's interpreter, else on the torch
    references, which are faster;
    parallel: its units run in processes of their own, several at once: their time goes into
    compiling.
    """

    name: str
    title: str
    seconds: float
    least_s: float
    needs: tuple[str, ...] = ("triton",)
    interpreted: bool = True
    parallel: bool = False


PIPELINE = ("triton", "psutil", "safetensors", "msgspec")
DEMO = (*PIPELINE, "tokenizers", "ftfy", "diffusers", "optimum", "rich")
STEPS = (
    Step("machine", "what machine this is, and its measured peaks", 20, 12, ()),
    Step("correct", "kernels against their references", 110, 45, parallel=True),
    Step("speed", "attention and linears of a block at 32,760 tokens, beside their peers", 120, 40),
    Step(
        "block",
        "one block beside diffusers'",
        40,
        25,
        ("triton", "diffusers", "optimum", "safetensors", "msgspec"),
    ),
    Step(
        "stream",
        "denoising steps of A14B's shapes: resident, within 6 GB, from disk",
        90,
        45,
        PIPELINE,
        interpreted=False,
    ),
    Step("demo", "the demo within three budgets", 45, 25, DEMO, interpreted=False),
    Step("tiles", "tiles that static bounds leave open", 40, 20),
    Step("more", "75,600 tokens, 8,192 tokens, other formats", 40, 20),
    Step("ncu", "Nsight Compute on the two slowest kernels", 35, 20),
)
TOTAL_S = sum(step.seconds for step in STEPS)


@dataclass
class Outcome:
    """How a step ended. reason: one line, empty where it is done."""

    step: Step
    status: str
    reason: str = ""
    seconds: float = 0.0


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    begin = time.monotonic()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"bench all: cannot make {options.out}: {problem_of(error)}",
            file=sys.stderr,
        )
        return 2
    call = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{os.getpid()}"
    run = Run(options, Results(options.out, call, options.earlier), begin)
    interrupted = False
    try:
        for step in STEPS:
            if step.name in (options.only or step.name):
                run.step(step)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        shutil.rmtree(run.work, ignore_errors=True)
    run.write_page()
    return (
        130
        if interrupted
        else 1
        if any(one.status in ("failed", "no device") for one in run.outcomes)
        else 0
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=TOTAL_S,
        help=f"all steps together, {TOTAL_S:.0f} where nothing is said",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the results: page.md, rows.jsonl, log.txt, demo.mp4",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="*",
        default=[],
        help="folders of earlier calls: what they measured stays",
    )
    parser.add_argument(
        "--only", nargs="+", choices=[step.name for step in STEPS], help="only these steps"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "bench",
        help="folder for 11 GB of random weights; removed at the end",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on a CPU at toy sizes: shows that all of it runs, and no speed",
    )
    parser.add_argument(
        "--commit", default="", help="the commit's name, where the folder is no git checkout"
    )
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error("--seconds must be positive")
    # the steps run in another folder
    options.out, options.work = options.out.resolve(), options.work.resolve()
    options.earlier = [path.resolve() for path in options.earlier]
    return options


class Run:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace, results: Results, begin: float) -> None:
        self.options, self.results = options, results
        self.deadline = begin + max(options.seconds - PAGE_S, options.seconds / 2)
        self.saved_s = 0.0  # of their shares, by the steps so far
        self.outcomes: list[Outcome] = []
        self.work = options.work / f"{os.getpid()}"
        self._log = Log(options.out / "log.txt")
        self._commit = options.commit or commit_of()

    def step(self, step: Step) -> None:
        """Runs it, whatever happens in it, and notes how it ended."""
        left = self.deadline - time.monotonic()
        share = step.seconds * self.options.seconds / TOTAL_S
        self._log.line(f"== {step.name}: {step.title}")
        if left < min(step.least_s, share):
            self._note(Outcome(step, "dropped", "no time was left"))
            return
        limit = min(left, max(share + self.saved_s, step.least_s))
        begin = time.monotonic()
        try:
            outcome = self._run(step, begin + limit)
        except KeyboardInterrupt:
            self._note(Outcome(step, "interrupted", "by Ctrl-C", time.monotonic() - begin))
            raise
        outcome.seconds = time.monotonic() - begin
        self.saved_s = max(0.0, self.saved_s + share - outcome.seconds)
        self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        reason = f": {outcome.reason}" if outcome.reason else ""
        self._log.line(
            f"== {outcome.step.name}: {outcome.status} in {outcome.seconds:.0f} s{reason}"
        )

    def _run(self, step: Step, deadline: float) -> Outcome:
        outcome, lost = Outcome(step, "failed", "it was not started"), list[str]()
        for _ in range(1 + RESTARTS):
            left = deadline - time.monotonic()
            code, last = run_process(
                self._command(step, left), self._environment(step), left, self._log
            )
            outcome = Outcome(step, *verdict(code, last, left))
            culprit = self.results.unfinished(step.name)
            if culprit is None and lost and outcome.status == "done":
                outcome.status, outcome.reason = "failed", "; ".join(lost)
            if culprit is None and code != DEVICE_LOST:
                return outcome
            if culprit is None:
                self._log.line(f"-- {step.name}: goes on in a new process: {outcome.reason}")
                continue
            # a full disk: the page says what the process said
            with contextlib.suppress(ResultsNotWritten):
                self.results.append(
                    {**culprit, "event": "end", "status": "failed", "reason": outcome.reason}
                )
            outcome.reason = f"{culprit['unit']}: {outcome.reason}"
            lost.append(outcome.reason)
            if code in (None, FAILED) or deadline - time.monotonic() < min(step.least_s, 10.0):
                return outcome
            self._log.line(f"-- {step.name}: goes on without {culprit['unit']}")
        return outcome

    def _command(self, step: Step, seconds: float) -> list[str]:
        options = self.options
        command = [
            sys.executable,
            "-u",
            "-m",
            "scripts.bench",
            "step",
            step.name,
            "--out",
            str(options.out),
        ]
        command += [
            "--seconds",
            f"{seconds:.1f}",
            "--call",
            self.results.call,
            "--work",
            str(self.work),
            "--commit",
            self._commit,
        ]
        command += [f"--earlier={path}" for path in options.earlier]
        return command + (["--rehearse"] if options.rehearse else [])

    def _environment(self, step: Step) -> dict[str, str]:
        """Ours less what would change the measurement. Kernels are forced: a refusal must stop a
        unit, not have the torch reference measured in the kernel's name. In a rehearsal no GPU is
        seen, and kernels are interpreted or not used.
        """
        names = ("LOWVRAM_BACKEND", "LOWVRAM_PV", "TRITON_INTERPRET")
        found = {name: value for name, value in os.environ.items() if name not in names}
        paths = [value for value in [os.environ.get("PYTHONPATH", "")] if value]
        paths += [str(ROOT / folder) for folder in (".", "kernels", "quantize")]
        found |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "LOWVRAM_BACKEND": "triton",
            "LOWVRAM_CACHE": str(self.work / "cache"),
        }
        if self.options.rehearse:
            found |= {
                "CUDA_VISIBLE_DEVICES": "",
                "LOWVRAM_BACKEND": "triton" if step.interpreted else "reference",
            }
            found |= {"TRITON_INTERPRET": "1"} if step.interpreted else {}
        return found

    def write_page(self) -> None:
        """On the terminal, and in page.md where the disk takes it."""
        text = page(self.results.records(), self.outcomes, STEPS, rehearsal=self.options.rehearse)
        self._log.line(text)
        try:
            (self.options.out / "page.md").write_text(text, encoding="utf-8")
        except OSError as error:
            self._log.line(f"bench all: page.md was not written: {problem_of(error)}")


def verdict(code: int | None, last: Sequence[str], limit_s: float) -> tuple[str, str]:
    """(status, reason) of a process by its exit code, None where it was stopped, and its last
    lines.
    """
    if code is None:
        return "out of time", f"stopped after {limit_s:.0f} s"
    said = next((line for line in reversed(last) if line.strip()), "")
    if code in STATUS:
        return STATUS[code], "" if said == WHOLE else said
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return "failed", f"was killed ({name})"
    return "failed", said if code == DEVICE_LOST else f"ended with {code}: {said}"


class Log:
    """Lines on the terminal and in a file; where the file takes no more, on the terminal alone."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._broken = path, threading.Lock(), False

    def line(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)
            if self._broken:
                return
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError as error:
                self._broken = True
                print(
                    f"bench all: log.txt is not written any more: {problem_of(error)}",
                    flush=True,
                )


def run_process(
    command: Sequence[str], environment: dict[str, str], seconds: float, log: Log
) -> tuple[int | None, list[str]]:
    """(exit code, last lines) of a command; None where it did not end in time and was stopped with
    all that it had started.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    own_group: dict[str, Any] = {"start_new_session": True} if os.name == "posix" else {}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **own_group,
    )

    def read() -> None:
        for line in process.stdout or ():
            last.append(line.rstrip("\n"))
            log.line(last[-1])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code: int | None
    try:
        code = process.wait(seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        stop(process)
    reader.join(KILL_AFTER_S)
    return code, list(last)


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a process and its children, whether it still runs or has left some
    behind.
    """
    if os.name != "posix":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_AFTER_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
