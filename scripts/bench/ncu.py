"""Nsight Compute on the two slowest kernels that `bench all` has measured: what limits them, as
the hardware counts it.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

from scripts.bench.results import Record
from scripts.bench.speed import Shapes
from scripts.bench.steps import Context, LeftOut, Row, Unit

SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "SchedulerStats",
    "Occupancy",
    "LaunchStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
)
KERNELS = {
    "attention": "attention_kernel",
    "linear": "linear_kernel",
    "ffn.0, GELU": "linear_kernel",
}
LAUNCHES = 3  # of which the last is profiled: the first compiles


def units(context: Context) -> Iterator[Unit]:
    """None of them runs without measured rows: those say which kernels are slowest."""
    slowest = slowest_of(context.rows("speed"))
    if not slowest:
        yield Unit("no kernel", no_rows)
    for row in slowest:
        yield Unit(
            f"{row['op']} {row['shape']}, {row['provider']}", partial(profiled, row, context)
        )


def no_rows() -> Iterator[Row]:
    raise LeftOut("no kernel was measured, so none is known to be slow")
    yield {}


def slowest_of(rows: list[Record]) -> list[Record]:
    """The slowest attention and the slowest linear in the default format: the two that a block
    waits for.
    """
    found = []
    for op in ("attention", "linear"):
        ours = [
            row
            for row in rows
            if row["op"].startswith(op)
            and row["provider"] in ("lowvram int8", "lowvram int8, PV int8")
        ]
        found += sorted(ours, key=lambda row: -row["median_ms"])[:1]
    return found


def profiled(row: Record, context: Context) -> Iterator[Row]:
    """A row with every metric of the chosen sections."""
    command = [
        *context.command,
        "--seconds",
        f"{context.left_s:.1f}",
        "--launch",
        f"{row['op']} {row['shape']}, {row['provider']}",
    ]
    if context.rehearse:
        run(command, context)  # what would be profiled
    if not shutil.which("ncu"):
        raise LeftOut("ncu is not installed")
    kernel = next(name for start, name in KERNELS.items() if row["op"].startswith(start))
    tool = [
        "ncu",
        "--csv",
        "--page",
        "details",
        "--print-units",
        "base",
        "--target-processes",
        "all",
        "--kernel-name",
        f"regex:{kernel}",
    ]
    tool += ["--launch-skip", str(LAUNCHES - 1), "--launch-count", "1"]
    for section in SECTIONS:
        tool += ["--section", section]
    metrics = metrics_of(run([*tool, *command], context))
    if not metrics:
        raise LeftOut("ncu printed no metric")
    yield {
        "op": row["op"],
        "shape": row["shape"],
        "provider": row["provider"],
        "median_ms": row["median_ms"],
        "metrics": metrics,
    }


def run(command: list[str], context: Context) -> str:
    """What it prints. Raises `LeftOut` where ncu may not read the counters, `RuntimeError` where
    anything else fails.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=max(1.0, context.left_s),
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    refused = next((line for line in said if "ERR_NVGPUCTRPERM" in line), "")
    if refused:
        raise LeftOut(refused.strip("= "))
    if done.returncode:
        raise RuntimeError(
            f"{command[0]} ended with {done.returncode}: {said[-1] if said else 'no word'}"
        )
    return done.stdout


def metrics_of(text: str) -> dict[str, str]:
    """Metric -> value with its unit, out of ncu's CSV, which follows lines of its own and of the
    program.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in csv.DictReader(lines)
        if row.get("Metric Name")
    }


def launch(name: str, context: Context) -> int:
    """Runs one call of the speed step a few times, for a profiler."""
    shapes = Shapes.of(context)
    for bench in [shapes.attention(), *shapes.products()]:
        for provider, prepare in bench.providers.items():
            if f"{bench.op} {bench.shape}, {provider}" == name:
                repeat(prepare)
                return 0
    raise LookupError(f"no call is named {name!r}")


def repeat(prepare: Callable[[], Callable[[int], object]]) -> None:
    call = prepare()
    for number in range(LAUNCHES):
        call(number)
