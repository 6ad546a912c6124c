"""One step of `bench all`, in a process of its own: its units one after the other, each noted as
it begins and ends.

python -m scripts.bench step NAME --out FOLDER --seconds 60     what `all` starts; `--units` runs only some, `--list` shows them
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.bench.results import Record, Results, ResultsNotWritten, problem_of, source_digest
from scripts.bench.run_all import (
    DEVICE_LOST,
    FAILED,
    LEFT_OUT,
    NO_DEVICE,
    OUT_OF_TIME,
    STEPS,
    WHOLE,
    Step,
)

Row = dict[str, Any]


class LeftOut(Exception):
    """A unit that cannot run here; says why in one line."""


class OutOfTime(Exception):
    """No time is left for the rest of a unit; what it has measured stays."""


@dataclass(frozen=True)
class Unit:
    """A piece of a step that succeeds or fails by itself. run: yields rows as they are measured;
    needs: packages beside the step's.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    needs: tuple[str, ...] = ()


@dataclass
class Context:
    """What a step's units are made for. identity: the machine, the versions and the code, which
    rows must share to be comparable.
    """

    results: Results
    folder: Path
    work: Path
    deadline: float
    rehearse: bool = False
    identity: str = ""
    facts: Row = field(default_factory=dict)
    command: list[str] = field(default_factory=list)  # starts this step again

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def rows(self, step: str) -> list[Record]:
        return self.results.rows(step, self.identity)

    def require_time(self) -> None:
        if self.left_s <= 0:
            raise OutOfTime


# The module and function that yields each step's units.
UNITS = {
    "machine": "scripts.bench.machine:units",
    "correct": "scripts.bench.correct:units",
    "speed": "scripts.bench.speed:speed_units",
    "block": "scripts.bench.models:block_units",
    "stream": "scripts.bench.models:stream_units",
    "demo": "scripts.bench.models:demo_units",
    "tiles": "scripts.bench.speed:tile_units",
    "more": "scripts.bench.speed:more_units",
    "ncu": "scripts.bench.ncu:units",
}


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        print(problem_of(error), flush=True)
        return FAILED


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=list(UNITS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--call", default="by hand")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--earlier", type=Path, action="append", default=[])
    parser.add_argument("--units", nargs="+", help="only these")
    parser.add_argument(
        "--launch",
        metavar="NAME",
        help="run one call of the speed step a few times, for a profiler",
    )
    parser.add_argument("--list", action="store_true", help="print the units' names and end")
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """The exit code, whose meaning is the last line that was printed."""
    deadline = time.monotonic() + options.seconds
    step = next(step for step in STEPS if step.name == options.step)
    missing = missing_packages(("torch", "numpy", *step.needs))
    lacks = f"not installed: {', '.join(missing)}" if missing else ""
    if not options.rehearse and "torch" not in missing and not has_device():
        print("; ".join(filter(None, ("no CUDA device", lacks))), flush=True)
        return NO_DEVICE
    if missing:
        print(lacks, flush=True)
        return LEFT_OUT
    import torch

    facts = identity_facts(options.commit, options.rehearse)
    context = Context(
        Results(options.out, options.call, options.earlier),
        options.out,
        options.work,
        deadline,
        options.rehearse,
        " | ".join(str(facts[name]) for name in ("gpu", "torch", "triton", "source")),
        facts,
        again(options),
    )
    module, function = UNITS[step.name].split(":")
    with torch.no_grad():
        if options.launch:
            return int(import_module("scripts.bench.ncu").launch(options.launch, context))
        units: list[Unit] = list(getattr(import_module(module), function)(context))
        if options.list:
            print("\n".join(unit.name for unit in units))
            return 0
        return run_units(step, units, context, options.units)


def has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def again(options: argparse.Namespace) -> list[str]:
    """The command of this process, to which `--seconds` and `--units` are added."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "scripts.bench",
        "step",
        options.step,
        "--out",
        str(options.out),
    ]
    command += ["--work", str(options.work), "--call", options.call, "--commit", options.commit]
    command += [f"--earlier={path}" for path in options.earlier]
    return command + (["--rehearse"] if options.rehearse else [])


def missing_packages(names: Iterable[str]) -> list[str]:
    """Those that cannot be imported here."""
    return [name for name in names if sys.modules.get(name) is None and find_spec(name) is None]


def identity_facts(commit: str, rehearse: bool) -> Row:
    """What every row carries: the machine, the versions and the code."""
    import torch

    name = f"rehearsal on {platform.machine()}" if rehearse else torch.cuda.get_device_name()
    return {
        "gpu": name,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit,
        "source": source_digest(),
    }


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run_units(
    step: Step, units: Sequence[Unit], context: Context, only: Sequence[str] | None = None
) -> int:
    """Runs units until the time is over. Says at the end what failed, what was left out and what no
    time was left for.
    """
    wanted = [unit for unit in units if unit.name in (only or (unit.name,))]
    done = context.results.done(step.name, context.identity)
    for name in [unit.name for unit in wanted if unit.name in done]:
        print(f"{name}: measured before", flush=True)
    waiting = [
        unit for unit in wanted if unit.name not in {*done, *context.results.failed(step.name)}
    ]
    if step.parallel and not only:
        lost = in_processes(step.name, [unit.name for unit in waiting], context)
    else:
        lost = in_turn(step.name, waiting, context)
    return summed_up(step.name, [unit.name for unit in wanted], context, lost)


def in_turn(step: str, units: Sequence[Unit], context: Context) -> bool:
    """Whether the device was lost: nothing after that is run."""
    for unit in units:
        if context.left_s <= 0 or run_unit(step, unit, context):
            break
    return device_is_lost(context.device)


def in_processes(step: str, names: Sequence[str], context: Context) -> bool:
    """Runs units in processes of their own, `workers()` at once, and stops them when the time is
    over. No device is lost by that.
    """
    waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
    while running or (waiting and context.left_s > 0):
        while waiting and len(running) < workers() and context.left_s > 0:
            name = waiting.pop(0)
            running[name] = subprocess.Popen(
                [*context.command, "--seconds", f"{context.left_s:.1f}", "--units", name]
            )
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            # it died in the unit, or before it
            if context.results.state(step, name) in ("begun", ""):
                reason = (
                    f"its process ended with {code}"
                    if code >= 0
                    else f"its process was killed (signal {-code})"
                )
                end(step, name, context, "failed", reason)
        if context.left_s <= 0:
            for name, process in running.items():
                process.kill()
                process.wait()
                end(step, name, context, "failed", "stopped: no time was left")
            break
        time.sleep(0.02)
    return False


def summed_up(step: str, names: Sequence[str], context: Context, lost: bool) -> int:
    """The exit code; its reason is the last line that is printed."""
    ended = {
        name: found
        for name in names
        if (found := context.results.ended(step, name, context.identity))
    }
    failed = [
        f"{name}: {found['reason']}" for name, found in ended.items() if found["status"] == "failed"
    ]
    left_out = [
        f"{name}: {found['reason']}"
        for name, found in ended.items()
        if found["status"] == "left out"
    ]
    rest = [name for name in names if name not in ended or ended[name]["status"] == "out of time"]
    parts = [f"{len(failed)} of {len(names)} failed: {in_short(failed)}"] if failed else []
    parts += [f"no time for {in_short(rest)}"] if rest and not lost else []
    parts += [f"left out: {in_short(left_out)}"] if left_out else []
    print(" | ".join(parts) or WHOLE, flush=True)
    if lost:
        return DEVICE_LOST
    return (
        FAILED
        if failed
        else OUT_OF_TIME
        if rest
        else LEFT_OUT
        if len(left_out) == len(names)
        else 0
    )


def in_short(texts: Sequence[str], most: int = 3) -> str:
    """The first of them, each cut to a line's length."""
    cut = [text if len(text) <= 200 else f"{text[:199]}…" for text in texts[:most]]
    return "; ".join(cut) + (f"; and {len(texts) - most} more" if len(texts) > most else "")


def run_unit(step: str, unit: Unit, context: Context) -> bool:
    """Runs a unit, whose rows and end are then on the disk. Whether its process must end: the
    device is lost.
    """
    record = {"step": step, "unit": unit.name, "identity": context.identity}
    begin = time.monotonic()
    context.results.append({**record, "event": "begin"})
    status, reason, lost = "done", "", False
    try:
        missing = missing_packages(unit.needs)
        if missing:
            raise LeftOut(f"not installed: {', '.join(missing)}")
        for row in unit.run():
            context.results.append({**record, "event": "row", **row, **context.facts})
            print(f"{unit.name}: {shown(row)}", flush=True)
    except LeftOut as error:
        status, reason, lost = "left out", str(error), device_is_lost(context.device)
    except OutOfTime:
        status, reason = "out of time", "the rest was not measured"
    except ResultsNotWritten:
        raise
    except Exception as error:
        traceback.print_exc()
        status, reason, lost = "failed", problem_of(error), device_is_lost(context.device)
    finally:
        release(context.device)
    if status != "done":
        print(f"{unit.name}: {status}: {reason}", flush=True)
    end(step, unit.name, context, status, reason, time.monotonic() - begin)
    return lost


def end(
    step: str, name: str, context: Context, status: str, reason: str, seconds: float = 0.0
) -> None:
    record = {
        "step": step,
        "unit": name,
        "identity": context.identity,
        "event": "end",
        "status": status,
        "reason": reason,
    }
    context.results.append({**record, "seconds": round(seconds, 2)})


def device_is_lost(device: str) -> bool:
    """After some faults a CUDA context refuses everything, which would read as a failure of every
    later unit.
    """
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def release(device: str) -> None:
    """Hands the device's memory back, for what runs next."""
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # the device is lost, which `device_is_lost` has seen
            print(f"the device's memory was not released: {problem_of(error)}", flush=True)


def shown(row: Row) -> str:
    """A row on one line of the terminal."""
    values = [
        (key, f"{value:.4g}" if isinstance(value, float) else value)
        for key, value in row.items()
        if value not in ("", None)
    ]
    return ", ".join(f"{key} {value}" for key, value in values)


def workers() -> int:
    """How many processes compile at once: no more than 8, each has a context on the GPU."""
    return max(1, min(8, os.cpu_count() or 1))
