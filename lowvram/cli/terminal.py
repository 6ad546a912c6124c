"""What a person sees while a job runs: progress bars with the time left, and tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from lowvram import progress
from lowvram.progress import PHASES
from lowvram.units import format_bytes
from lowvram.variants import VARIANTS

if TYPE_CHECKING:
    from lowvram_quantize.progress import QuantizeProgress

    from lowvram.memory.usage import PhaseUsage
    from lowvram.planner.plan import MemoryPlan
    from lowvram.planner.prediction import Prediction
    from lowvram.plans.table import Matrix


LINE_PERIOD_S = 15.0


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Lines:
    """Progress where no terminal can show bars, such as a log: what begins, and every
    `LINE_PERIOD_S` seconds how far it is.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[str, float] = {}

    def say(self, label: str, state: str) -> None:
        now = time.monotonic()
        if label not in self._said:
            self._console.print(label, soft_wrap=True)
        elif now - self._said[label] >= LINE_PERIOD_S:
            self._console.print(f"{label}: {state}", soft_wrap=True, highlight=False)
        else:
            return
        self._said[label] = now


@contextmanager
def generation_progress(console: Console) -> Iterator[progress.Listener]:
    """One bar per phase; the time left is the pipeline's own estimate."""
    if not console.is_terminal:
        lines = Lines(console)
        yield lambda event: lines.say(
            PHASES[event.phase].label, f"{event.done} of {event.total}{_left(event)}"
        )
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    bars: dict[str, TaskID] = {}
    with RichProgress(*columns, console=console) as shown:

        def listen(event: progress.Progress) -> None:
            if event.phase not in bars:
                bars[event.phase] = shown.add_task(
                    PHASES[event.phase].label, total=event.total, left=""
                )
            shown.update(
                bars[event.phase], completed=event.done, left=_left(event).removeprefix(", ")
            )

        yield listen


def _left(event: progress.Progress) -> str:
    return (
        ""
        if event.seconds_left is None or event.done == event.total
        else f", {duration(event.seconds_left)} left"
    )


class PhaseTimer:
    """A listener that passes every event on and keeps when each phase began and last reported, and
    how many units were done between.
    """

    def __init__(self, listener: progress.Listener) -> None:
        self._listener = listener
        self._spans: dict[str, tuple[float, float, int, int]] = {}

    def __call__(self, event: progress.Progress) -> None:
        now = time.monotonic()
        began, _, first, _ = self._spans.get(event.phase, (now, now, event.done, event.done))
        self._spans[event.phase] = (began, now, first, event.done)
        self._listener(event)

    @property
    def phase_s(self) -> dict[str, float]:
        """Seconds from a phase's first event to its last."""
        return {phase: last - began for phase, (began, last, _, _) in self._spans.items()}

    @property
    def step_s(self) -> float | None:
        """Mean seconds of the denoising steps made here."""
        began, last, first, done = self._spans.get("denoise", (0.0, 0.0, 0, 0))
        return (last - began) / (done - first) if done > first else None


def compared_times(prediction: Prediction | None, timer: PhaseTimer) -> dict[str, Any]:
    """{"actual": {phase: seconds, "step": …}, "predicted": the same or None}: what was measured in
    this run, and what the plan foretold.
    """
    actual = {**timer.phase_s, "step": timer.step_s}
    predicted = None if prediction is None else {**prediction.phase_s, "step": prediction.step_s}
    return {"actual": actual, "predicted": predicted}


def times_table(prediction: Prediction, times: dict[str, Any]) -> Table:
    """Predicted and actual seconds side by side."""
    table = Table(
        title=f"time; predicted from the {_BASES[prediction.basis]} of {prediction.machine}"
    )
    for name, justify in (
        ("phase", "left"),
        ("predicted", "right"),
        ("actual", "right"),
        ("actual / predicted", "right"),
    ):
        table.add_column(name, justify="left" if justify == "left" else "right")
    labels = {name: phase.label for name, phase in PHASES.items()}
    labels["step"] = "one denoising step"
    for phase, predicted in times["predicted"].items():
        actual = times["actual"].get(phase)
        ratio = f"{actual / predicted:.2f}" if actual and predicted > 0 else "-"
        table.add_row(
            labels[phase], _precise(predicted), "-" if actual is None else _precise(actual), ratio
        )
    return table


def compared_peaks(plan: MemoryPlan, actual: Mapping[str, PhaseUsage]) -> dict[str, Any]:
    """{"planned": {phase: {"vram_bytes", "ram_bytes"}}, "actual": the same}: what the plan grants,
    and what was really taken.
    """
    planned = {
        phase.phase: {"vram_bytes": phase.vram_bytes, "ram_bytes": phase.ram_bytes}
        for phase in plan.phases
    }
    return {
        "planned": planned,
        "actual": {phase: usage.to_dict() for phase, usage in actual.items()},
    }


def peaks_table(peaks: dict[str, Any]) -> Table:
    """Planned and actual bytes side by side; where the device's memory is the host's, both in
    one.
    """
    apart = any(usage["vram_bytes"] is not None for usage in peaks["actual"].values())
    table = Table(title="peak memory")
    kinds = (
        {"VRAM": ("vram_bytes",), "RAM": ("ram_bytes",)}
        if apart
        else {"memory": ("vram_bytes", "ram_bytes")}
    )
    table.add_column("phase")
    for kind in kinds:
        table.add_column(f"{kind}, planned", justify="right")
        table.add_column(f"{kind}, actual", justify="right")
    for phase, planned in peaks["planned"].items():
        actual = peaks["actual"].get(phase, {})
        cells = []
        for names in kinds.values():
            found = [actual[name] for name in names if actual.get(name) is not None]
            cells += [
                format_bytes(sum(planned[name] for name in names)),
                format_bytes(sum(found)) if found else "-",
            ]
        table.add_row(PHASES[phase].label, *cells)
    return table


_BASES = {
    "measured": "measured speeds",
    "predicted": "kernels' machine code and the data sheet",
    "table": "table's assumptions",
    "given": "given speeds",
}


def _precise(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"


def plan_table(plan: MemoryPlan, gpu: str | None = None) -> Table:
    """The denoising phase's VRAM item by item, then the peak of every phase, then the predicted
    time. gpu: the card that was named.
    """
    choice = plan.choice
    table = Table(
        title=f"{plan.variant} {plan.format}, {plan.width}x{plan.height} x {plan.num_frames} "
        f"frames, {plan.num_tokens:,} tokens"
    )
    table.add_column("VRAM while denoising")
    table.add_column("bytes", justify="right")
    names = {
        "residual stream": "x, fp32"
        + (", both guidance branches" if choice.joint_guidance else ""),
        "keys and values": "K and V",
        "chunk workspace": f"chunk workspace, {choice.chunk_tokens} tokens",
        "block slots": f"{choice.resident_blocks + choice.ring_slots} block slots "
        f"({choice.resident_blocks} resident)",
    }
    for name, nbytes in plan.items.items():
        if nbytes:
            table.add_row(names.get(name, name), format_bytes(nbytes))
    table.add_row("sum", format_bytes(sum(plan.items.values())), style="bold", end_section=True)
    for phase in plan.phases:
        peak = f"{format_bytes(phase.vram_bytes)} VRAM, {format_bytes(phase.ram_bytes)} RAM"
        table.add_row(f"peak of the {phase.phase} phase", peak)
    table.add_row(
        "peak of the run",
        f"{format_bytes(plan.peak_vram_bytes)} VRAM, {format_bytes(plan.peak_ram_bytes)} RAM",
        style="bold",
    )
    streamed = plan.num_blocks - choice.resident_blocks
    _add_prediction(table, plan, gpu)
    in_ram = f"{choice.host_blocks} in RAM" + (
        f" ({choice.pinned_blocks} of them page-locked)" if choice.pinned_blocks else ""
    )
    where = f"{choice.resident_blocks} in VRAM, {in_ram}, {streamed - choice.host_blocks} from disk"
    visits = "; both guidance branches share a visit" if choice.joint_guidance else ""
    table.caption = f"blocks of the expert at work: {where}{visits}{_note(plan.variant)}"
    return table


def _add_prediction(table: Table, plan: MemoryPlan, gpu: str | None) -> None:
    prediction = plan.prediction
    if prediction is None:
        table.add_section()
        advice = (
            f"none: {_no_rate(plan.format)}"
            if gpu
            else "name a card with --gpu, or run `lowvram doctor` where the GPU is"
        )
        table.add_row("predicted time", advice)
        return
    table.add_section()
    table.add_row(f"predicted from the {_BASES[prediction.basis]}", prediction.machine)
    table.add_row(
        "a denoising step, predicted",
        f"{_precise(prediction.step_s)}, {prediction.overhead:.1%} more than with all resident",
    )
    for phase, seconds in prediction.phase_s.items():
        table.add_row(f"{PHASES[phase].label}, predicted", _precise(seconds))
    table.add_row("the video, predicted", _precise(prediction.video_s), style="bold")


def _no_rate(format: str) -> str:
    return (
        f"the table of cards has no rate for {format}; it has those of int8, int8-plain, "
        f"fp8 and bf16"
    )


def _note(variant: str) -> str:
    """What the tables add for some variants, on a line of its own."""
    note = VARIANTS[variant].note if variant in VARIANTS else ""
    return f"\n{note}" if note else ""


def matrix_table(matrix: Matrix) -> Table:
    """Sizes and lengths against VRAM budgets: the predicted time of a video, or that it does not
    fit.
    """
    source = {
        "measured": "its measured speeds",
        "predicted": "by its data sheet and the machine code of the kernels",
        "table": "by the table of cards",
    }.get(matrix.basis, "given speeds")
    what = f"{matrix.variant} {matrix.format}, {format_bytes(matrix.ram_bytes)} of RAM"
    title = f"{what}: time of a video, predicted for {matrix.machine}, {source}"
    table = Table(title=title)
    budgets = list(dict.fromkeys(cell.vram_bytes for cell in matrix.cells))
    table.add_column("size x frames")
    for budget in budgets:
        table.add_column(f"VRAM {format_bytes(budget)}", justify="right")
    rows: dict[tuple[int, int, int], dict[int, str]] = {}
    for cell in matrix.cells:
        prediction = cell.plan.prediction if cell.plan else None
        text = (
            "does not fit"
            if cell.plan is None
            else duration(prediction.video_s)
            if prediction
            else "fits"
        )
        rows.setdefault((cell.width, cell.height, cell.num_frames), {})[cell.vram_bytes] = text
    for (width, height, frames), texts in rows.items():
        table.add_row(f"{width}x{height} x {frames}", *(texts[budget] for budget in budgets))
    timed = any(cell.plan and cell.plan.prediction for cell in matrix.cells)
    known = timed or all(cell.plan is None for cell in matrix.cells)
    times = (
        "all times are predictions" if known else f"no time is predicted: {_no_rate(matrix.format)}"
    )
    table.caption = (
        f"{times}; --size WIDTHxHEIGHT --frames N --vram … shows one of them in full"
        + _note(matrix.variant)
    )
    return table


def plan_line(plan: MemoryPlan) -> str:
    choice = plan.choice
    return (
        f"plan: {format_bytes(plan.peak_vram_bytes)} VRAM and "
        f"{format_bytes(plan.peak_ram_bytes)} RAM at most, "
        f"{choice.resident_blocks} of {plan.num_blocks} blocks resident, "
        f"{choice.host_blocks} in RAM, "
        f"chunks of {choice.chunk_tokens} tokens"
        + (f"; predicted: {_precise(plan.prediction.video_s)}" if plan.prediction else "")
    )


@contextmanager
def quantize_progress(console: Console) -> Iterator[Callable[[QuantizeProgress], None]]:
    """One bar for the search for NaN and one for the writing, with bytes, speed and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[tensor]}", style="dim"),
    )
    labels = {"scan": "checking the source", "quantize": "quantizing"}
    bars: dict[str, TaskID] = {}
    if not console.is_terminal:
        lines = Lines(console)

        def say(event: QuantizeProgress) -> None:
            amount = (
                f"{format_bytes(event.done_bytes)} of {format_bytes(event.total_bytes)}, "
                f"{format_bytes(event.bytes_per_s)}/s"
            )
            lines.say(labels[event.phase], f"{amount}, {duration(event.left_s)} left")

        yield say
        return
    with RichProgress(*columns, console=console) as shown:

        def listen(event: QuantizeProgress) -> None:
            if event.phase not in bars:
                bars[event.phase] = shown.add_task(
                    labels[event.phase], total=event.total_bytes, speed="", left="", tensor=""
                )
            over = event.done_bytes >= event.total_bytes
            shown.update(
                bars[event.phase],
                completed=event.done_bytes,
                speed=f"{format_bytes(event.bytes_per_s)}/s",
                left="" if over else f"{duration(event.left_s)} left",
                tensor="" if over else f"{event.component} {event.tensor}",
            )

        yield listen


@contextmanager
def verify_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """One bar over the bytes hashed."""
    if not console.is_terminal:
        lines = Lines(console)
        yield lambda done, total: lines.say(
            "verifying", f"{format_bytes(done)} of {format_bytes(total)}"
        )
        return
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as shown:
        bar = shown.add_task("verifying", total=None)
        yield lambda done, total: shown.update(bar, completed=done, total=total)


def inspect_table(found: dict[str, Any]) -> Table:
    """What `inspect_path` found: a row per component, or the one file."""
    title = {"store": "quantized model", "source": f"{found.get('layout')} checkpoint"}.get(
        found["kind"], found["kind"]
    )
    facts = [str(found[key]) for key in ("format", "dialect", "component") if found.get(key)]
    table = Table(title=f"{found['path']}: {title}{', ' + ', '.join(facts) if facts else ''}")
    for name in ("component", "tensors", "bytes", "dtypes"):
        table.add_column(name, justify="left" if name in ("component", "dtypes") else "right")
    for component, part in found.get(
        "components", {found.get("component") or "file": found}
    ).items():
        dtypes = ", ".join(
            f"{dtype} {format_bytes(entry['bytes'])}" for dtype, entry in part["dtypes"].items()
        )
        table.add_row(component, f"{part['tensors']:,}", format_bytes(part["bytes"]), dtypes)
    if "config" in found:
        dit = found["config"]["dit"]
        sizes = (
            f"{dit['num_layers']} blocks, dim {dit['dim']}, ffn {dit['ffn_dim']}, "
            f"{dit['num_heads']} heads"
        )
        table.caption = f"{found['config']['variant']}: {sizes}"
    if found.get("verified"):
        table.caption = f"{table.caption}; every tensor agrees with its hash"
    return table


def doctor_table(report: dict[str, Any]) -> Table:
    """A line per finding, with what to do about it."""
    table = Table(title="lowvram doctor")
    for name in ("what", "status", "detail", "advice"):
        table.add_column(name, overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "missing": "red"}
    for finding in report["findings"]:
        status = finding["status"]
        table.add_row(
            finding["name"],
            f"[{styles[status]}]{status}[/]",
            escape(finding["detail"]),
            escape(finding["advice"]),
        )
    return table
