"""What a person sees while a job runs: progress bars with the time left, and tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from lowvram import progress
from lowvram.config import format_bytes

if TYPE_CHECKING:
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
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as shown:

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
        table.add_row(f"peak of the {phase.phase} phase", f"{format_bytes(phase.vram_bytes)} VRAM, {format_bytes(phase.ram_bytes)} RAM")
    table.add_row("peak of the run", f"{format_bytes(plan.peak_vram_bytes)} VRAM, {format_bytes(plan.peak_ram_bytes)} RAM", style="bold")
    streamed = plan.num_blocks - choice.resident_blocks
    where = f"{choice.resident_blocks} in VRAM, {choice.host_blocks} in RAM, {streamed - choice.host_blocks} from disk"
    table.caption = f"blocks of the expert at work: {where}" + ("; both guidance branches share a visit" if choice.joint_guidance else "")
    return table


def plan_line(plan: MemoryPlan) -> str:
    choice = plan.choice
    return (
        f"plan: {format_bytes(plan.peak_vram_bytes)} VRAM and {format_bytes(plan.peak_ram_bytes)} RAM at most, "
        f"{choice.resident_blocks} of {plan.num_blocks} blocks resident, {choice.host_blocks} in RAM, chunks of {choice.chunk_tokens} tokens"
    )
