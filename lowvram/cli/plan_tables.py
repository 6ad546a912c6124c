"""Tables of plans and matrices of `lowvram plan`, and of planned against actual memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lowvram.cli.progress import PhaseTimer, duration
from lowvram.cli.terminal import printable
from lowvram.hardware.budgets import AUTO_SHARE
from lowvram.planner.phases import PHASES
from lowvram.timing.cards import find_card
from lowvram.units import format_memory
from lowvram.variants import VARIANTS

if TYPE_CHECKING:
    from lowvram.memory.usage import PhaseUsage
    from lowvram.planner.plan import MemoryPlan
    from lowvram.planner.prediction import Prediction
    from lowvram.plans.table import Matrix

_BASES = {
    "measured": "measured speeds",
    "predicted": "kernels' machine code and the data sheet",
    "table": "table's assumptions",
    "given": "given speeds",
}


def plan_line(plan: MemoryPlan) -> str:
    """A plan in one line: peaks, placement of blocks, chunk length and predicted time."""
    choice = plan.choice
    return (
        f"plan: {format_memory(plan.peak_vram_bytes)} VRAM and "
        f"{format_memory(plan.peak_ram_bytes)} RAM at most, "
        f"{choice.resident_blocks} of {plan.num_blocks} blocks resident, "
        f"{choice.host_blocks} in RAM, "
        f"chunks of {choice.chunk_tokens} tokens"
        + (f"; predicted: {_seconds(plan.prediction.video_s)}" if plan.prediction else "")
    )


def plan_table(plan: MemoryPlan, gpu: str | None = None, note: str = "") -> Table:
    """Table of a plan: VRAM items of the denoising phase, peak of each phase, predicted times.

    gpu: the card named by the user, if any; note: a line below the table.
    """
    choice, workload = plan.choice, plan.workload
    table = Table(
        title=f"{printable(workload.config.variant)} {workload.format.name}, "
        f"{workload.width}x{workload.height} x {workload.num_frames} frames, "
        f"{workload.num_tokens:,} tokens"
    )
    table.add_column("VRAM while denoising")
    table.add_column("size", justify="right")
    labels = {
        "residual stream": "activations between blocks"
        + (", both guidance branches" if choice.joint_guidance else ""),
        "keys and values": "keys and values of attention",
        "chunk workspace": f"workspace for {choice.chunk_tokens} tokens at a time",
        "block slots": f"weights: {choice.resident_blocks} blocks that stay, room for "
        f"{choice.ring_slots} that pass",
    }
    for name, nbytes in plan.items.items():
        if nbytes:
            table.add_row(labels.get(name, name), format_memory(nbytes))
    table.add_row("sum", format_memory(sum(plan.items.values())), style="bold", end_section=True)
    for phase in plan.phases:
        peak = f"{format_memory(phase.vram_bytes)} VRAM, {format_memory(phase.ram_bytes)} RAM"
        table.add_row(f"peak of the {phase.phase} phase", peak)
    table.add_row(
        "peak of the run",
        f"{format_memory(plan.peak_vram_bytes)} VRAM, {format_memory(plan.peak_ram_bytes)} RAM",
        style="bold",
    )
    _add_prediction(table, plan, gpu)
    table.caption = (
        _placement(plan) + _variant_note(workload.config.variant) + (f"\n{note}" if note else "")
    )
    return table


def budget_note(gpu: str | None, vram: str | None) -> str:
    """How much of a card `auto` takes, where a plan is for one; else nothing."""
    if gpu is None or vram not in (None, "auto"):
        return ""
    total = format_memory(find_card(gpu).vram_bytes)
    return (
        f"the VRAM budget is auto: {AUTO_SHARE:.0%} of the card's {total}; the rest is for the "
        f"desktop and other programs"
    )


def _placement(plan: MemoryPlan) -> str:
    """Where the blocks of the active expert are kept."""
    choice = plan.choice
    in_ram = f"{choice.host_blocks} in RAM" + (
        f" ({choice.pinned_blocks} of them page-locked)" if choice.pinned_blocks else ""
    )
    on_disk = plan.num_blocks - choice.resident_blocks - choice.host_blocks
    visits = "; both guidance branches share each visit of a block" if choice.joint_guidance else ""
    return (
        f"blocks of the active expert: {choice.resident_blocks} in VRAM, {in_ram}, "
        f"{on_disk} from disk{visits}"
    )


def _add_prediction(table: Table, plan: MemoryPlan, gpu: str | None) -> None:
    prediction = plan.prediction
    table.add_section()
    if prediction is None:
        reason = (
            f"none: {_no_rate(plan.workload.format.name)}"
            if gpu
            else "name a card with --gpu, or run `lowvram doctor` where the GPU is"
        )
        table.add_row("predicted time", reason)
        return
    table.add_row(f"predicted from the {_BASES[prediction.basis]}", printable(prediction.machine))
    table.add_row(
        "a denoising step, predicted",
        f"{_seconds(prediction.step_s)}, {prediction.overhead:.1%} more than with all blocks "
        f"resident",
    )
    for phase, seconds in prediction.phase_s.items():
        table.add_row(f"{PHASES[phase].label}, predicted", _seconds(seconds))
    table.add_row("the video, predicted", _seconds(prediction.video_s), style="bold")


def matrix_table(matrix: Matrix) -> Table:
    """Table of sizes and lengths against VRAM budgets: predicted time of the video, or that it does
    not fit.
    """
    source = {
        "measured": "from its measured speeds",
        "predicted": "from its data sheet and the kernels' machine code",
        "table": "from the table of cards",
    }.get(matrix.basis, "from given speeds")
    model = f"{matrix.variant} {matrix.format}, {format_memory(matrix.ram_bytes)} of RAM"
    machine = printable(matrix.machine)
    title = f"{model}: time of a video, predicted for {machine} {source}"
    table = Table(title=title, min_width=64)
    budgets = list(dict.fromkeys(cell.vram_bytes for cell in matrix.cells))
    table.add_column("size x frames")
    for budget in budgets:
        table.add_column(f"VRAM {format_memory(budget)}", justify="right")
    rows: dict[tuple[int, int, int], dict[int, str]] = {}
    for cell in matrix.cells:
        row = rows.setdefault((cell.width, cell.height, cell.num_frames), {})
        row[cell.vram_bytes] = _cell_text(cell.plan)
    for (width, height, frames), texts in rows.items():
        table.add_row(f"{width}x{height} x {frames}", *(texts[budget] for budget in budgets))
    table.caption = (
        f"{_times_note(matrix)}; --size WIDTHxHEIGHT --frames N --vram … shows one plan in full"
        + _variant_note(matrix.variant)
    )
    return table


def _cell_text(plan: MemoryPlan | None) -> str:
    if plan is None:
        return "does not fit"
    return duration(plan.prediction.video_s) if plan.prediction else "fits"


def _times_note(matrix: Matrix) -> str:
    plans = [cell.plan for cell in matrix.cells if cell.plan]
    if not plans or any(plan.prediction for plan in plans):
        return "all times are predictions"
    return f"no time is predicted: {_no_rate(matrix.format)}"


def _no_rate(format: str) -> str:
    return (
        f"the table of cards has no rate for {format}; it has those of int8, int8-plain, "
        f"fp8 and bf16"
    )


def _variant_note(variant: str) -> str:
    """The note of `VARIANTS` on a line of its own, or nothing."""
    note = VARIANTS[variant].note if variant in VARIANTS else ""
    return f"\n{note}" if note else ""


def compared_times(prediction: Prediction | None, timer: PhaseTimer) -> dict[str, Any]:
    """Actual and predicted seconds of a run, as JSON values.

    `{"actual": {phase: seconds, "step": seconds or None}, "predicted": the same or None}`.
    """
    actual = {**timer.phase_s, "step": timer.step_s}
    predicted = None if prediction is None else {**prediction.phase_s, "step": prediction.step_s}
    return {"actual": actual, "predicted": predicted}


def times_table(prediction: Prediction, times: dict[str, Any]) -> Table:
    """Table of predicted and actual seconds. times: from `compared_times`, with predictions."""
    table = Table(
        title=f"time; predicted from the {_BASES[prediction.basis]} of "
        f"{printable(prediction.machine)}"
    )
    table.add_column("phase")
    for name in ("predicted", "actual", "actual / predicted"):
        table.add_column(name, justify="right")
    labels = {name: phase.label for name, phase in PHASES.items()}
    labels["step"] = "one denoising step"
    for phase, predicted in times["predicted"].items():
        actual = times["actual"].get(phase)
        ratio = f"{actual / predicted:.2f}" if actual and predicted > 0 else "-"
        table.add_row(
            labels[phase], _seconds(predicted), "-" if actual is None else _seconds(actual), ratio
        )
    return table


def compared_peaks(plan: MemoryPlan, actual: Mapping[str, PhaseUsage]) -> dict[str, Any]:
    """Planned and actual peaks of every phase in bytes, as JSON values.

    `{"planned": {phase: {"vram_bytes": …, "ram_bytes": …}}, "actual": the same}`.
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
    """Table of planned and actual bytes. peaks: from `compared_peaks`.

    VRAM and RAM are summed where the device's memory is the host's (a CPU).
    """
    separate = any(usage["vram_bytes"] is not None for usage in peaks["actual"].values())
    table = Table(title="peak memory")
    kinds = (
        {"VRAM": ("vram_bytes",), "RAM": ("ram_bytes",)}
        if separate
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
            measured = [actual[name] for name in names if actual.get(name) is not None]
            cells += [
                format_memory(sum(planned[name] for name in names)),
                format_memory(sum(measured)) if measured else "-",
            ]
        table.add_row(PHASES[phase].label, *cells)
    return table


def _seconds(seconds: float) -> str:
    """Like `duration`, with three digits below a minute."""
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
