"""Timing, the measured peak of a GPU, raw results as CSV and as bars: what the benchmarks share."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scripts.bench import ROOT
from scripts.bench.plots import Bar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WARM_UP = 3
# About a millisecond of waiting on the GPU, in which the host queues what is measured: else small
# calls would show the host's speed.
HEAD_START_CYCLES = 2_000_000


@dataclass(frozen=True)
class Row:
    """One provider at one shape. `rate`: TOPS, or GB/s for element-wise ops; `share`: of the peak
    measured in the same run.
    """

    op: str
    shape: str
    provider: str
    p20_ms: float
    median_ms: float
    p80_ms: float
    rate: float
    unit: str
    share: float
    gpu: str
    torch: str
    commit: str


def require_cuda(command: str) -> bool:
    """Whether there is a CUDA device; says in one line what to do where there is none."""
    if torch.cuda.is_available():
        return True
    print(
        f"{command}: no CUDA device here, nothing was measured; run `python "
        f"scripts/{command}` on a machine with one"
    )
    return False


def measure(
    run: Callable[[int], object], repeats: int = 20, device: str = "cuda"
) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile) of ms per call; `run(i)` takes the i-th set of
    inputs, so that none stays in a cache.
    """
    for index in range(WARM_UP):
        run(index)
    times = []
    for index in range(repeats):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            run(index)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run(index)
            times.append((time.perf_counter() - begin) * 1e3)
    times.sort()
    return times[int(0.2 * (repeats - 1))], times[repeats // 2], times[int(0.8 * (repeats - 1))]


def peaks(
    size: int = 8192, copied_bytes: int = 2**30, device: str = "cuda", repeats: int = 20
) -> dict[str, float]:
    """The best that the vendor's libraries reach here: TOPS of square products in bf16 and int8,
    GB/s of a copy (read + write).
    """
    operations = 2.0 * size**3
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = {"bf16": operations / measure(lambda _: a @ b, repeats, device)[0] / 1e9}
    a8, b8 = (
        torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2)
    )
    rates["int8"] = (
        operations / measure(lambda _: torch._int_mm(a8, b8.t()), repeats, device)[0] / 1e9
    )
    source = torch.randint(0, 255, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy"] = (
        2 * source.numel() / measure(lambda _: target.copy_(source), repeats, device)[0] / 1e6
    )
    return rates


def machine() -> tuple[str, str, str]:
    """(GPU, torch, commit); the commit is "unknown" without git or outside a repository."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        commit = result.stdout.strip()
    except OSError:
        commit = ""
    return name, torch.__version__, commit or "unknown"


def reason(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def write_csv(path: Path, rows: Sequence[DataclassInstance]) -> None:
    """One line per row, all of one dataclass, whose fields are the columns. What `path` held before
    stays until all of it is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(partial, path)


def rate_bars(rows: Sequence[Row]) -> list[Bar]:
    """Bars of the rate, grouped by op and shape, each of its unit's largest."""
    largest = {
        unit: max(row.rate for row in rows if row.unit == unit)
        for unit in {row.unit for row in rows}
    }
    return [
        Bar(
            f"{row.op} {row.shape}",
            row.provider,
            row.rate / largest[row.unit],
            f"{row.rate:.0f} {row.unit}, {row.median_ms:.2f} ms",
        )
        for row in rows
    ]


def table(rows: Sequence[Row]) -> str:
    lines = ["| op | shape | provider | ms | rate | share of peak |", "|---|---|---|--:|--:|--:|"]
    for row in rows:
        share = f"{row.share:.0%}" if row.share else "-"
        lines.append(
            f"| {row.op} | {row.shape} | {row.provider} | {row.median_ms:.3f} | "
            f"{row.rate:.0f} {row.unit} | {share} |"
        )
    return "\n".join(lines)
