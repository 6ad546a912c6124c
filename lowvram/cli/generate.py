"""`lowvram generate`: run a request, save the video, print planned and actual memory and time."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lowvram.cli.plan_tables import (
    compared_peaks,
    compared_times,
    peaks_table,
    plan_line,
    times_table,
)
from lowvram.cli.progress import PhaseTimer, generation_progress
from lowvram.cli.terminal import emit, printable
from lowvram.errors import OutputError
from lowvram.memory.usage import PhasePeaks
from lowvram.pipeline import Pipeline, Video
from lowvram.planner.plan import MemoryPlan
from lowvram.progress import Listener, Progress
from lowvram.request import Request
from lowvram.sampling.state import saved_seed, state_path


@dataclass(frozen=True)
class Output:
    """Where and how a video is saved, and what is printed. scale, metadata: as in `Video.save`."""

    path: Path
    overwrite: bool
    resume: bool
    scale: int
    metadata: str
    progress: str
    as_json: bool


def drawn_seed(path: Path, resume: bool, console: Console) -> int:
    """A random seed, or that of the interrupted run of `path`; it is printed."""
    saved = saved_seed(state_path(path)) if resume else None
    seed = secrets.randbelow(2**31) if saved is None else saved
    console.print(f"seed: {seed}")
    return seed


def run(pipeline: Pipeline, request: Request, output: Output, console: Console) -> None:
    """Generate, save and print. Raises `LowvramError`."""
    plan = pipeline.plan(request)
    console.print(plan_line(plan))
    with generation_progress(console, output.progress) as listener:
        timer = PhaseTimer(_told_resumption(listener, console) if output.resume else listener)
        peaks = PhasePeaks(timer, pipeline.device.type, pipeline.host.context_bytes)
        video = _resumable(pipeline, request, plan, output, peaks, console)
        memory = compared_peaks(plan, peaks.by_phase)
        video.save(
            output.path, overwrite=output.overwrite, scale=output.scale, metadata=output.metadata
        )
    state_path(output.path).unlink(missing_ok=True)
    times = compared_times(plan.prediction, timer)
    if output.as_json:
        facts = {
            "out": str(output.path),
            "request": video.request.__dict__,
            "peak_bytes": video.peak_bytes,
            "plan": plan.to_dict(),
            "memory": memory,
            "seconds": times,
            "prompt_tokens": pipeline.prompt_tokens(request),
        }
        emit(json.dumps(facts), finished_work=True)
        return
    console.print(peaks_table(memory))
    if plan.prediction is not None:
        console.print(times_table(plan.prediction, times))
    emit(str(output.path), finished_work=True)


def _told_resumption(listener: Listener, console: Console) -> Listener:
    """A listener that also says at which step a resumed run goes on."""
    told = False

    def listen(event: Progress) -> None:
        nonlocal told
        if event.phase == "denoise" and not told:
            told = True
            console.print(f"continuing at step {event.done + 1} of {event.total}")
        listener(event)

    return listen


def _resumable(
    pipeline: Pipeline,
    request: Request,
    plan: MemoryPlan,
    output: Output,
    listener: Listener,
    console: Console,
) -> Video:
    """Generate with a state file beside the video, so that an interrupted run can be resumed."""
    state = state_path(output.path)
    if state.exists() and not output.resume:
        if not output.overwrite:
            raise OutputError(
                f"{state} exists from an interrupted run: continue it with --resume, or start "
                f"anew with --overwrite"
            )
        console.print(
            f"starting anew; removed {printable(str(state))} of an interrupted run", soft_wrap=True
        )
        state.unlink()
    try:
        return pipeline.generate(
            request, plan=plan, state_file=state, resume=output.resume, listener=listener
        )
    except KeyboardInterrupt:
        if state.exists():
            console.print(
                f"the finished steps are saved in {printable(str(state))}: run the same command "
                f"with --resume to continue",
                soft_wrap=True,
            )
        raise
