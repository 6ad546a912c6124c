"""The goals of the streaming benchmark: each is met, missed or not measured, with its number and
the row that decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowvram.variants import EXPERTS, T2V_A14B
from scripts.bench.plots import TIMELINE_BLOCKS, timeline_plot, write_svg
from scripts.bench.stream_rows import FAILED, GAVE_UP, NOT_MEASURED, SAME_PLAN, StreamRow
from scripts.bench.timeline import Timeline

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
MOST_OVERHEAD, MOST_ERROR = 0.02, 0.10
SMALL_RAM_GB, SMALL_VRAM_GB = 8.0, 6.0
BF16_RESIDENT = "diffusers bf16 resident"
LAYERS = T2V_A14B.dit.num_layers
# what the goals are about: said to be missing where it is
CLIPS = (("832x480", 81, LAYERS), ("1280x720", 81, LAYERS))


@dataclass(frozen=True)
class Verdict:
    """One goal for one clip. number: what was measured, or why nothing was; row: the worst row,
    which decides, where there is one.
    """

    goal: Goal
    clip: str
    result: str
    number: str
    row: StreamRow | None = None

    def __str__(self) -> str:
        return f"goal {self.result}: {self.clip}: {self.goal.text}: {self.number}"


Judged = tuple[str, str, "StreamRow | None"]


@dataclass(frozen=True)
class Goal:
    """name: part of a file's name; judge: (result, number, row) of the rows of one clip; size: the
    only one it is about, where not all.
    """

    name: str
    text: str
    judge: Callable[[Sequence[StreamRow]], Judged]
    size: str = ""


def verdicts(rows: Sequence[StreamRow]) -> list[Verdict]:
    """Every goal for every clip in `rows`, and for those clips of the goals that no row is of."""
    clips = {row.clip: [other for other in rows if other.clip == row.clip] for row in rows}
    found = [
        Verdict(goal, f"{size} x {frames}, {layers} layers, {steps} steps", *_judged(goal, of_clip))
        for (size, frames, layers, steps), of_clip in clips.items()
        for goal in GOALS
        if goal.size in ("", size)
    ]
    absent = [clip for clip in CLIPS if clip not in {clip[:3] for clip in clips}]
    return found + [
        Verdict(goal, f"{size} x {frames}, {layers} layers", UNKNOWN, "no row of this clip")
        for size, frames, layers in absent
        for goal in GOALS
        if goal.size in ("", size)
    ]


def report_goals(
    output: Path,
    rows: Sequence[StreamRow],
    timelines: Mapping[tuple[object, ...], Timeline],
    rehearsal: bool = False,
) -> list[Verdict]:
    """Says how every goal stands, on the terminal and in OUTPUT.md; a missed one gets a timeline of
    its worst row.

    timelines: of this call's rows, by their keys. A picture that an earlier call made stays while
    its row is still the one that misses.
    """
    found, pictures = verdicts(rows), dict[Verdict, str]()
    for verdict in found:
        print(verdict, flush=True)
        if verdict.result != MISSED or verdict.row is None:
            continue
        path, timeline = (
            picture_of(output, verdict.goal.name, verdict.row),
            timelines.get(verdict.row.key),
        )
        if timeline is not None and timeline.visits:
            shown = around_switch(timeline) if verdict.goal.name == "switch" else timeline
            write_svg(
                path,
                timeline_plot(
                    shown, f"{verdict.clip}, {verdict.row.budgets}, missed: {verdict.goal.name}"
                ),
            )
        if path.exists():
            pictures[verdict] = path.name
    for path in output.parent.glob(f"{output.name}-missed-*.svg"):
        if path.name not in pictures.values():
            path.unlink()
    source = (
        f"{rows[-1].gpu}, torch {rows[-1].torch}, commit {rows[-1].commit}: the rows in "
        f"[{output.name}.csv]({output.name}.csv)"
    )
    output.with_suffix(".md").write_text(
        document(found, source, pictures, rehearsal), encoding="utf-8"
    )
    return found


def picture_of(output: Path, goal: str, row: StreamRow) -> Path:
    """The timeline of a row that misses a goal."""
    clip = f"{row.size}x{row.frames}-{row.layers}x{row.steps}"
    return output.with_name(
        f"{output.name}-missed-{goal}-{clip}-{row.vram_budget_gb:.1f}-{row.ram_budget_gb:.1f}.svg"
    )


def around_switch(timeline: Timeline) -> Timeline:
    """As many visits as a picture shows, half of them the second expert's first."""
    first = next(
        (number for number, visit in enumerate(timeline.visits) if visit.component == EXPERTS[1]),
        len(timeline.visits),
    )
    return Timeline(timeline.copies, timeline.visits[: first + TIMELINE_BLOCKS // 2])


def document(
    found: Sequence[Verdict], source: str, pictures: Mapping[Verdict, str], rehearsal: bool
) -> str:
    """Markdown. source: the machine and the rows; pictures: file names of the timelines of missed
    goals.
    """
    lines = [
        "# The goals of the streaming benchmark",
        "",
        f"Written by `scripts/bench/__main__.py stream`. {source}.",
    ]
    if rehearsal:
        lines += [
            "",
            "**A rehearsal on a CPU:** it shows that the benchmark runs and says nothing "
            "about any GPU.",
        ]
    lines += ["", "| clip | goal | result | measured | timeline |", "|---|---|---|---|---|"]
    for verdict in found:
        picture = pictures.get(verdict, "")
        shown = (
            f"[{picture}]({picture})" if picture else "not kept" if verdict.result == MISSED else ""
        )
        cells = (verdict.clip, verdict.goal.text, verdict.result, verdict.number, shown)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _judged(goal: Goal, rows: Sequence[StreamRow]) -> Judged:
    result, number, row = goal.judge(rows)
    broken = sum(row.note.startswith((FAILED, GAVE_UP)) for row in _lowvram(rows))
    return (
        result,
        f"{number}; without {broken} that failed or left their plan" if broken else number,
        row,
    )


def _lowvram(rows: Sequence[StreamRow]) -> list[StreamRow]:
    return [row for row in rows if row.provider.startswith("lowvram")]


def _held(rows: Sequence[StreamRow]) -> list[StreamRow]:
    """lowvram's rows that were measured and kept their plan."""
    return [
        row for row in _lowvram(rows) if row.step_s is not None and not row.note.startswith(GAVE_UP)
    ]


def _within(rows: Sequence[StreamRow], budget: str, most: float) -> list[StreamRow]:
    """Of the rows that were measured, those whose budget is no larger, and those whose plan such a
    row shares.
    """
    small = [row for row in _lowvram(rows) if (getattr(row, budget) or most + 1) <= most]
    shared = {row.note.removeprefix(SAME_PLAN) for row in small if row.note.startswith(SAME_PLAN)}
    return [row for row in _held(rows) if row in small or row.budgets in shared]


def _worst(
    rows: Sequence[StreamRow], value: Callable[[StreamRow], float]
) -> tuple[StreamRow, float, str]:
    """(row, its value, which row it is)."""
    row = max(rows, key=value)
    return (
        row,
        value(row),
        f"within {row.budgets}" + (f", the worst of {len(rows)}" if len(rows) > 1 else ""),
    )


def _result(met: bool) -> str:
    return MET if met else MISSED


def _overhead(rows: Sequence[StreamRow]) -> Judged:
    values = {
        row: row.overhead
        for row in _held(rows)
        if row.resident != row.layers and row.overhead is not None
    }
    if not values:
        return UNKNOWN, "no streamed row beside one with everything resident", None
    row, overhead, which = _worst([*values], values.__getitem__)
    return _result(overhead <= MOST_OVERHEAD), f"{overhead:+.1%} {which}", row


def _prediction(rows: Sequence[StreamRow]) -> Judged:
    values = {
        row: row.predicted_s / row.step_s - 1
        for row in _held(rows)
        if row.step_s and row.predicted_s is not None and row.rates == "measured"
    }
    if not values:
        return UNKNOWN, "no prediction from this machine's own speeds", None
    row, _, which = _worst([*values], lambda row: abs(values[row]))
    took = f"{row.predicted_s:.3f} s predicted, {row.step_s:.3f} s measured"
    return _result(abs(values[row]) <= MOST_ERROR), f"{values[row]:+.1%} {which} ({took})", row


def _switch(rows: Sequence[StreamRow]) -> Judged:
    values = {
        row: row.switch_stall_s / row.block_s
        for row in _held(rows)
        if row.switch_stall_s is not None and row.block_s
    }
    if not values:
        return UNKNOWN, "no row has both the stall at the switch and the time of a block", None
    row, blocks, which = _worst([*values], values.__getitem__)
    return (
        _result(blocks <= 1),
        f"{row.switch_stall_s:.3f} s {which} ({blocks:.2f} of a block's {row.block_s:.3f} s)",
        row,
    )


def _against_diffusers(rows: Sequence[StreamRow]) -> Judged:
    reference = next((row for row in rows if row.provider == BF16_RESIDENT), None)
    values = {row: row.step_s for row in _held(rows) if row.step_s is not None}
    if reference is None or reference.step_s is None:
        return (
            UNKNOWN,
            f"{BF16_RESIDENT}: "
            f"{reference.note.removeprefix(NOT_MEASURED) if reference else 'no row'}",
            None,
        )
    if not values:
        return UNKNOWN, "no row of lowvram's", None
    row, step_s, which = _worst([*values], values.__getitem__)
    return (
        _result(step_s < reference.step_s),
        f"{step_s:.3f} s {which}, diffusers {reference.step_s:.3f} s",
        row,
    )


def _ram(rows: Sequence[StreamRow]) -> Judged:
    values = {
        row: row.peak_rss_gb
        for row in _within(rows, "ram_budget_gb", SMALL_RAM_GB)
        if row.peak_rss_gb is not None
    }
    if not values:
        return UNKNOWN, f"no row with a RAM budget of at most {SMALL_RAM_GB:.0f} GB", None
    row, peak, which = _worst([*values], values.__getitem__)
    slowest = [other.overhead for other in values if other.overhead is not None]
    speed = f"disk {row.disk_gb_s:.2f} GB/s" if row.disk_gb_s is not None else "disk not measured"
    cost = f"overhead at most {max(slowest):+.1%}" if slowest else "overhead not measured"
    return _result(peak <= SMALL_RAM_GB), f"{peak:.2f} GB {which} ({speed}, {cost})", row


def _vram(rows: Sequence[StreamRow]) -> Judged:
    values = {
        row: row.peak_vram_gb
        for row in _within(rows, "vram_budget_gb", SMALL_VRAM_GB)
        if row.peak_vram_gb is not None
    }
    asked = [
        row
        for row in _lowvram(rows)
        if row.vram_budget_gb is not None and row.vram_budget_gb <= SMALL_VRAM_GB
    ]
    refused = [
        row
        for row in asked
        if row.note.startswith(NOT_MEASURED) and not row.note.startswith(SAME_PLAN)
    ]
    if not values and refused:
        return MISSED, f"no plan: {refused[0].note.removeprefix(NOT_MEASURED)}", refused[0]
    if not values:
        return UNKNOWN, f"no row with a VRAM budget of at most {SMALL_VRAM_GB:.0f} GB", None
    row, peak, which = _worst([*values], values.__getitem__)
    digests = {other.latents_sha256 for other in _lowvram(rows) if other.latents_sha256}
    compared = [other for other in _held(rows) if other.latents_sha256 and other not in values]
    if peak > SMALL_VRAM_GB or len(digests) > 1:
        bits = "the budgets changed the bits" if len(digests) > 1 else "the same bits"
        return MISSED, f"{peak:.3f} GB {which}, {bits}", row
    if not compared:
        return (
            UNKNOWN,
            f"{peak:.3f} GB {which}, but no row of a larger budget to compare the bits with",
            row,
        )
    return MET, f"{peak:.3f} GB {which}, the same bits as within {compared[0].budgets}", row


GOALS = (
    Goal(
        "overhead",
        f"streamed runs take at most {MOST_OVERHEAD:.0%} longer than everything resident",
        _overhead,
    ),
    Goal("vram", f"within {SMALL_VRAM_GB:.0f} GB of VRAM, with the same bits", _vram, CLIPS[1][0]),
    Goal("ram", f"host RSS of at most {SMALL_RAM_GB:.0f} GB within RAM budgets that small", _ram),
    Goal("prediction", f"a step takes what was predicted, within {MOST_ERROR:.0%}", _prediction),
    Goal(
        "switch",
        "the first step of the second expert stalls no longer than one block computes",
        _switch,
    ),
    Goal("diffusers", "a step is faster than diffusers resident in bf16", _against_diffusers),
)
