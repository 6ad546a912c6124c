"""The rows of the streaming benchmark: how they are kept beside an earlier call's, drawn, and
complained about.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

from scripts.bench.plots import Bar
from scripts.bench.timing import machine

# How notes begin. Where a lowvram row begins with one of the last two, the benchmark fails.
NOT_MEASURED, FAILED, GAVE_UP = "not measured: ", "failed: ", "the plan did not hold: "
SAME_PLAN = f"{NOT_MEASURED}same plan as "  # and the budgets of the row that was measured


@dataclass(frozen=True)
class StreamRow:
    """One provider under one pair of budgets at one size. Empty: not measured, or of no meaning
    there; `note` says why.

    overhead: of the median step against lowvram with everything resident; switch_s: the first step
    of the second expert;
    block_s: the median of computing one block; stall_s: how long computing waited for blocks after
    the first step; switch_stall_s: the part of it in the second expert's first step;
    predicted_s: the plan's prediction of a step, from `rates` "measured" here or of a "table";
    predicted_switch_stall_s: what the switch is predicted to add.
    """

    provider: str
    size: str
    frames: int
    tokens: int
    layers: int
    steps: int
    vram_budget_gb: float | None = None
    ram_budget_gb: float | None = None
    resident: int | None = None
    ring: int | None = None
    host: int | None = None
    pinned: int | None = None
    chunk: int | None = None
    joint: bool | None = None
    step_s: float | None = None
    steps_s: str = ""
    switch_s: float | None = None
    block_s: float | None = None
    stall_s: float | None = None
    switch_stall_s: float | None = None
    overhead: float | None = None
    peak_vram_gb: float | None = None
    planned_vram_gb: float | None = None
    peak_rss_gb: float | None = None
    planned_ram_gb: float | None = None
    predicted_s: float | None = None
    predicted_switch_stall_s: float | None = None
    rates: str = ""
    disk_gb_s: float | None = None
    latents_sha256: str = ""
    gpu: str = ""
    torch: str = ""
    commit: str = ""
    note: str = ""

    @property
    def clip(self) -> tuple[str, int, int, int]:
        """Rows of one clip are comparable."""
        return self.size, self.frames, self.layers, self.steps

    @property
    def key(self) -> tuple[object, ...]:
        """What a later row replaces."""
        return self.provider, *self.clip, self.vram_budget_gb, self.ram_budget_gb

    @property
    def budgets(self) -> str:
        if self.vram_budget_gb is None or self.ram_budget_gb is None:
            return ""
        return f"{self.vram_budget_gb:.1f} + {self.ram_budget_gb:.1f} GB"


def machine_of(device_type: str) -> tuple[str, str, str]:
    """(GPU, torch, commit); in a rehearsal on a CPU its name in the place of the GPU's."""
    name, version, commit = machine()
    return name if device_type == "cuda" else processor(), version, commit


def processor() -> str:
    """The processor's name as the system tells it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return (
        next(filter(None, names), "") or platform.processor() or platform.machine() or "unknown CPU"
    )


def read_rows(path: Path, here: tuple[str, str, str]) -> list[StreamRow]:
    """An earlier call's rows, where they are of `here` (GPU, torch, commit); a file of others is
    renamed after its commit and kept.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found, columns = list(reader), reader.fieldnames
    ours = all((row.get("gpu"), row.get("torch"), row.get("commit")) == here for row in found)
    if ours and columns == [column.name for column in fields(StreamRow)]:
        return [
            StreamRow(
                **{
                    column.name: _value(str(column.type), row[column.name])
                    for column in fields(StreamRow)
                }
            )
            for row in found
        ]
    commit = (found[0].get("commit") if found else None) or "unknown"
    names = (
        path.with_name(f"{path.stem}-{commit}{suffix}{path.suffix}")
        for suffix in ("", *(f"-{number}" for number in range(2, 10**4)))
    )
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    print(
        f"{path} is of another GPU, torch or commit, or has other columns: kept as {kept.name}",
        flush=True,
    )
    return []


def _value(kind: str, text: str) -> Any:
    if not text and "None" in kind:
        return None
    if "bool" in kind:
        return text == "True"
    return int(text) if "int" in kind else float(text) if "float" in kind else text


def merged(earlier: Sequence[StreamRow], rows: Sequence[StreamRow]) -> list[StreamRow]:
    """Both, a later row in the place of the earlier one with its key; clip by clip, lowvram's rows
    first.
    """
    by_key = {row.key: row for row in (*earlier, *rows)}
    number = count()
    clips = {clip: next(number) for clip in dict.fromkeys(row.clip for row in by_key.values())}
    return sorted(
        by_key.values(), key=lambda row: (clips[row.clip], not row.provider.startswith("lowvram"))
    )


def row_bars(rows: Sequence[StreamRow]) -> list[Bar]:
    """Seconds per step of each row that was measured, grouped by clip."""
    longest = max((row.step_s for row in rows if row.step_s is not None), default=1.0)
    found = []
    for row in rows:
        if row.step_s is None:
            continue
        group = f"{row.size} x {row.frames}, {row.layers} layers, seconds per step"
        name = f"{row.provider}, {row.budgets}" if row.budgets else row.provider
        found.append(Bar(group, name, row.step_s / longest, f"{row.step_s:.3f}"))
    return found


def problems(rows: Sequence[StreamRow]) -> list[str]:
    """What makes the benchmark fail: rows of lowvram that failed or left their plan, other latents,
    peaks above the plan's.
    """
    broken = [
        row
        for row in rows
        if row.provider.startswith("lowvram") and row.note.startswith((FAILED, GAVE_UP))
    ]
    return (
        [f"{row.size} within {row.budgets}: {row.note}" for row in broken]
        + disagreements(rows)
        + exceeded(rows)
    )


def disagreements(rows: Sequence[StreamRow]) -> list[str]:
    """Clips whose latents differ between budgets."""
    digests: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        if row.latents_sha256:
            digests.setdefault(row.clip, set()).add(row.latents_sha256)
    return [
        f"{clip[0]}: the budgets changed the latents: {', '.join(sorted(found))}"
        for clip, found in digests.items()
        if len(found) > 1
    ]


def exceeded(rows: Sequence[StreamRow]) -> list[str]:
    """Rows whose measured peak lies above the plan's; one that left its plan has peaks of two."""
    pairs = (("VRAM", "peak_vram_gb", "planned_vram_gb"), ("RAM", "peak_rss_gb", "planned_ram_gb"))
    found = []
    for row in rows:
        for label, peak, planned in pairs:
            measured, allowed = getattr(row, peak), getattr(row, planned)
            if (
                measured is not None
                and allowed is not None
                and measured > allowed
                and not row.note.startswith(GAVE_UP)
            ):
                found.append(
                    f"{row.size} within {row.budgets}: {label} {measured:.3f} GB of "
                    f"{allowed:.3f} planned"
                )
    return found
