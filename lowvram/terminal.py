"""What a person sees while a job runs: progress bars with the time left, and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from lowvram import progress
from lowvram.config import format_bytes

if TYPE_CHECKING:
    from lowvram_quantize.progress import Progress as QuantizeProgress

    from lowvram.memory.plan import MemoryPlan

LABELS = {
    "text": "reading the prompt",
    "conditioning": "preparing the experts",
    "denoise": "denoising",
    "decode": "decoding frames",
    "write": "writing the video",
}


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def generation_progress(console: Console) -> Iterator[progress.Listener]:
    """One bar per phase; the time left is the pipeline's own estimate."""
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
                bars[event.phase] = shown.add_task(LABELS[event.phase], total=event.total, left="")
            left = "" if event.seconds_left is None or event.done == event.total else f"{duration(event.seconds_left)} left"
            shown.update(bars[event.phase], completed=event.done, left=left)

        yield listen


def plan_table(plan: MemoryPlan) -> Table:
    """The denoising phase's VRAM item by item, then the peak of every phase."""
    choice = plan.choice
    table = Table(title=f"{plan.variant} {plan.format}, {plan.width}x{plan.height} x {plan.num_frames} frames, {plan.num_tokens:,} tokens")
    table.add_column("VRAM while denoising")
    table.add_column("bytes", justify="right")
    names = {
        "residual stream": "x, fp32" + (", both guidance branches" if choice.joint_guidance else ""),
        "keys and values": "K and V",
        "chunk workspace": f"chunk workspace, {choice.chunk_tokens} tokens",
        "block slots": f"{choice.resident_blocks + choice.ring_slots} block slots ({choice.resident_blocks} resident)",
    }
    for name, nbytes in plan.items.items():
        if nbytes:
            table.add_row(names.get(name, name), format_bytes(nbytes))
    table.add_row("sum", format_bytes(sum(plan.items.values())), style="bold", end_section=True)
    for phase in plan.phases:
        peak = f"{format_bytes(phase.vram_bytes)} VRAM, {format_bytes(phase.ram_bytes)} RAM"
        table.add_row(f"peak of the {phase.phase} phase", peak)
    table.add_row("peak of the run", f"{format_bytes(plan.peak_vram_bytes)} VRAM, {format_bytes(plan.peak_ram_bytes)} RAM", style="bold")
    streamed = plan.num_blocks - choice.resident_blocks
    where = f"{choice.resident_blocks} in VRAM, {choice.host_blocks} in RAM, {streamed - choice.host_blocks} from disk"
    table.caption = f"blocks of the expert at work: {where}" + ("; both guidance branches share a visit" if choice.joint_guidance else "")
    return table


def plan_line(plan: MemoryPlan) -> str:
    choice = plan.choice
    return (
        f"plan: {format_bytes(plan.peak_vram_bytes)} VRAM and {format_bytes(plan.peak_ram_bytes)} RAM at most, "
        f"{choice.resident_blocks} of {plan.num_blocks} blocks resident, {choice.host_blocks} in RAM, "
        f"chunks of {choice.chunk_tokens} tokens"
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
    with RichProgress(*columns, console=console) as shown:

        def listen(event: QuantizeProgress) -> None:
            if event.phase not in bars:
                bars[event.phase] = shown.add_task(labels[event.phase], total=event.total_bytes, speed="", left="", tensor="")
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
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as shown:
        bar = shown.add_task("verifying", total=None)
        yield lambda done, total: shown.update(bar, completed=done, total=total)


def inspect_table(found: dict[str, Any]) -> Table:
    """What `inspect_path` found: a row per component, or the one file."""
    title = {"store": "quantized model", "source": f"{found.get('layout')} checkpoint"}.get(found["kind"], found["kind"])
    facts = [str(found[key]) for key in ("format", "dialect", "component") if found.get(key)]
    table = Table(title=f"{found['path']}: {title}{', ' + ', '.join(facts) if facts else ''}")
    for name in ("component", "tensors", "bytes", "dtypes"):
        table.add_column(name, justify="left" if name in ("component", "dtypes") else "right")
    for component, part in found.get("components", {found.get("component") or "file": found}).items():
        dtypes = ", ".join(f"{dtype} {format_bytes(entry['bytes'])}" for dtype, entry in part["dtypes"].items())
        table.add_row(component, f"{part['tensors']:,}", format_bytes(part["bytes"]), dtypes)
    if "config" in found:
        dit = found["config"]["dit"]
        sizes = f"{dit['num_layers']} blocks, dim {dit['dim']}, ffn {dit['ffn_dim']}, {dit['num_heads']} heads"
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
        table.add_row(finding["name"], f"[{styles[status]}]{status}[/]", finding["detail"], finding["advice"])
    return table
