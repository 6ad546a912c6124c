"""The command line: one function per subcommand; each parses, calls and prints."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from lowvram.cli import options as opts
from lowvram.cli.terminal import (
    PrintableFormatter,
    accept_every_character,
    emit,
    make_console,
    printable,
)
from lowvram.errors import CheckpointError, LowvramError, OutputError, UsageError
from lowvram.files.lock import OutputLock
from lowvram.files.output import check_output, fresh_output
from lowvram.request import MAX_PROMPT_CHARACTERS

if TYPE_CHECKING:
    from rich.table import Table

    from lowvram.pipeline import Pipeline, Video
    from lowvram.planner.plan import MemoryPlan
    from lowvram.progress import Listener, Progress
    from lowvram.request import Request

console = make_console(stderr=True)
MAX_PROMPT_BYTES = 4 * MAX_PROMPT_CHARACTERS  # in UTF-8


class Commands(TyperGroup):
    """The group of subcommands.

    Exit codes: 0 success, 1 failure (one line; `--debug` shows the traceback), 2 wrong usage,
    130 interrupted.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; print a `LowvramError` as one line and exit with its code.

        With --json it is also an object on standard output.
        """
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except LowvramError as error:
            if ctx.params.get("debug"):
                raise
            if as_json:
                facts = {"type": type(error).__name__, "message": str(error)}
                emit(json.dumps({"error": facts}))
            make_console(stderr=True).print(
                f"error: {printable(str(error))}", style="red", soft_wrap=True
            )
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            console.print("interrupted")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    help="Run Wan2.2 A14B (text to video) on one consumer GPU within VRAM and RAM budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    version: opts.Version = False,
    debug: opts.Debug = False,
    verbose: opts.Verbose = False,
    quiet: opts.Quiet = False,
) -> None:
    """Options before the subcommand. `Commands.invoke` reads `debug`."""
    console.quiet = quiet
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


@app.command()
def demo(
    out: opts.DemoOut = Path("demo.mp4"),
    prompt: opts.DemoPrompt = "a red circle moves right on a white background",
    seed: opts.Seed = 0,
    format: opts.Format = "int8",
    overwrite: opts.DemoOverwrite = False,
) -> None:
    """Quantize the small bundled model and generate a video with it; runs on any machine."""
    from lowvram.cli.progress import duration, generation_progress
    from lowvram.demo.run import is_own_clip, run_demo

    check_output(out, overwrite or is_own_clip(out))
    with generation_progress(console) as listener:
        result = run_demo(prompt, seed, format, listener)
    result.video.save(out, overwrite=overwrite or is_own_clip(out), scale=result.scale)
    console.print(
        f"quantized in {duration(result.quantize_s)}, generated in "
        f"{duration(result.generate_s)}: “{printable(prompt)}”"
    )
    emit(str(out), finished_work=True)


@app.command(epilog="Example: lowvram quantize Wan2.2-T2V-A14B MODEL --allow-pickle")
def quantize(
    source: opts.Source,
    model: opts.NewModel,
    format: opts.Format = "int8",
    resume: opts.ResumeQuantize = False,
    allow_pickle: opts.AllowPickle = False,
    overwrite: opts.Overwrite = False,
    as_json: opts.Json = False,
) -> None:
    """Quantize a checkpoint into a model for streaming, in bounded memory; resumable."""
    _check_readable(source)
    _check_readable(model)
    if not source.is_dir():  # before torch is imported
        raise CheckpointError(f"{source} is not a folder: give the folder of the whole model")
    from lowvram_quantize.convert import quantize as convert
    from lowvram_quantize.report import summary_table

    from lowvram.cli.progress import quantize_progress

    with quantize_progress(console) as listener:
        report = convert(
            source,
            model,
            format,
            resume=resume,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
            progress=listener,
        )
    if as_json:
        emit(json.dumps({"model": str(model)} | report.summary()), finished_work=True)
        return
    emit(summary_table(report), str(model), finished_work=True)


@app.command(
    epilog='Example: lowvram generate MODEL -p "a lighthouse in a storm" --size 480p --vram 8GiB'
)
def generate(
    model: opts.Model,
    prompt: opts.Prompt = None,
    prompt_file: opts.PromptFile = None,
    negative_prompt: opts.NegativePrompt = None,
    size: opts.Size = None,
    width: opts.Width = None,
    height: opts.Height = None,
    frames: opts.Frames = None,
    steps: opts.Steps = None,
    shift: opts.Shift = None,
    guidance: opts.Guidance = None,
    guidance_high: opts.GuidanceHigh = None,
    guidance_low: opts.GuidanceLow = None,
    seed: opts.SeedOrRandom = 0,
    solver: opts.Solver = "unipc",
    refine_steps: opts.RefineSteps = 0,
    vram: opts.Vram = "auto",
    ram: opts.Ram = "auto",
    device: opts.Device = "auto",
    resume: opts.ResumeGenerate = False,
    out: opts.Out = None,
    scale: opts.Scale = 1,
    overwrite: opts.Overwrite = False,
    prompt_cache: opts.PromptCache = True,
    as_json: opts.Json = False,
) -> None:
    """Generate a video within VRAM and RAM budgets."""
    # What can be known without torch, whose import takes seconds.
    text = _prompt(prompt, prompt_file)
    if (width is None) != (height is None):
        raise UsageError("give both --width and --height, or --size WIDTHxHEIGHT")
    if width is not None and size is not None:
        raise UsageError("give either --size or --width and --height")
    _check_readable(model)
    if not model.exists():
        raise CheckpointError(
            f"{model} does not exist: make it with `lowvram quantize SOURCE {model}`"
        )
    out = out or fresh_output(Path(), resume)
    check_output(out, overwrite)
    from lowvram.pipeline import load

    pipeline = load(model, vram, ram, device, prompt_cache)
    request = pipeline.request(
        text,
        negative_prompt=negative_prompt,
        size=size if width is None else (width, height),
        frames=frames,
        steps=steps,
        shift=shift,
        guidance_high=guidance if guidance_high is None else guidance_high,
        guidance_low=guidance if guidance_low is None else guidance_low,
        seed=_drawn_seed(out, resume) if seed == -1 else seed,
        solver=solver,
        refine_steps=refine_steps,
    )
    with OutputLock(out, is_file=True):
        check_output(out, overwrite)  # a run that held the lock may have finished
        _generate(pipeline, request, out, resume, overwrite, scale, as_json)


def _drawn_seed(out: Path, resume: bool) -> int:
    """A random seed, or that of the interrupted run of `out`; it is printed."""
    from lowvram.sampling.state import saved_seed, state_path

    saved = saved_seed(state_path(out)) if resume else None
    seed = secrets.randbelow(2**31) if saved is None else saved
    console.print(f"seed: {seed}")
    return seed


def _generate(
    pipeline: Pipeline,
    request: Request,
    out: Path,
    resume: bool,
    overwrite: bool,
    scale: int,
    as_json: bool,
) -> None:
    """Run a request, save the video and print planned and actual memory and time."""
    from lowvram.cli.plan_tables import (
        compared_peaks,
        compared_times,
        peaks_table,
        plan_line,
        times_table,
    )
    from lowvram.cli.progress import PhaseTimer, generation_progress
    from lowvram.memory.usage import PhasePeaks
    from lowvram.sampling.state import state_path

    plan = pipeline.plan(request)
    console.print(plan_line(plan))
    with generation_progress(console) as listener:
        timer = PhaseTimer(_told_resumption(listener) if resume else listener)
        peaks = PhasePeaks(timer, pipeline.device.type, pipeline.host.context_bytes)
        video = _resumable(pipeline, request, plan, out, resume, peaks)
        memory = compared_peaks(plan, peaks.by_phase)
        video.save(out, overwrite=overwrite, scale=scale)
    state_path(out).unlink(missing_ok=True)
    times = compared_times(plan.prediction, timer)
    if as_json:
        facts = {
            "out": str(out),
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
    emit(str(out), finished_work=True)


def _told_resumption(listener: Listener) -> Listener:
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
    out: Path,
    resume: bool,
    listener: Listener,
) -> Video:
    """Generate with a state file beside `out`, so that an interrupted run can be resumed."""
    from lowvram.sampling.state import state_path

    state = state_path(out)
    if state.exists() and not resume:
        raise OutputError(
            f"{state} exists from an interrupted run: continue it with --resume, or remove it"
        )
    try:
        return pipeline.generate(
            request, plan=plan, state_file=state, resume=resume, listener=listener
        )
    except KeyboardInterrupt:
        if state.exists():
            console.print(
                f"interrupted; the finished steps are saved in {printable(str(state))}: run the "
                f"same command with --resume to continue"
            )
        raise


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of --prompt or --prompt-file. Raises `UsageError` unless exactly one is given, and
    `LowvramError` if the file cannot be read as UTF-8.
    """
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give either --prompt TEXT or --prompt-file FILE")
    if prompt_file is None:
        return prompt or ""
    try:
        if str(prompt_file) == "-":
            content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with prompt_file.open("rb") as file:
                content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise UsageError(
                f"the prompt file {prompt_file} is longer than {MAX_PROMPT_BYTES} bytes: give a "
                f"text file that contains the prompt alone"
            )
        # utf-8-sig: editors on Windows may write a byte order mark.
        return content.decode("utf-8-sig")
    except OSError as error:
        advice = "check the name, or use --prompt TEXT"
        raise LowvramError(
            f"cannot read the prompt file {prompt_file}: {error.strerror}: {advice}"
        ) from error
    except UnicodeDecodeError as error:
        raise LowvramError(
            f"the prompt file {prompt_file} is not UTF-8 text: save it as UTF-8"
        ) from error


def _check_readable(path: Path) -> None:
    """Raise `LowvramError` if the user has no permission to read `path`.

    A path that does not exist passes; the command itself reports it.
    """
    try:
        needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        allowed = not path.exists() or os.access(path, needed)
    except OSError as error:  # for example a parent folder without permission, or a long name
        raise LowvramError(
            f"cannot read {path}: {error.strerror}: check its name, its owner and its permissions"
        ) from error
    if not allowed:
        raise LowvramError(
            f"cannot read {path}: Permission denied: check its owner and its permissions"
        )


@app.command(epilog='Example: lowvram plan t2v-a14b --size 480p --gpu "RTX 3060 12GB"')
def plan(
    model: opts.ModelOrVariant,
    size: opts.PlannedSize = None,
    frames: opts.Frames = None,
    steps: opts.Steps = None,
    refine_steps: opts.RefineSteps = 0,
    vram: opts.PlannedVram = None,
    ram: opts.Ram = "16GiB",
    format: opts.Format = "int8",
    gpu: opts.Gpu = None,
    link: opts.Link = None,
    disk: opts.Disk = None,
    as_json: opts.Json = False,
) -> None:
    """Predict peak memory and time of a run, without a GPU; without --size, of many sizes."""
    from lowvram.cli.plan_tables import matrix_table, plan_table
    from lowvram.plans import api as planning

    settings: dict[str, Any] = {
        "frames": frames,
        "steps": steps,
        "refine_steps": refine_steps,
        "vram": vram,
        "ram": ram,
        "format": format,
        "gpu": gpu,
        "link": link,
        "disk": disk,
    }
    if size is None:
        matrix = planning.plan_matrix(model, **settings)
        _show(matrix.to_dict(), lambda: matrix_table(matrix), as_json)
    else:
        single = planning.plan(model, size=size, **settings)
        _show(single.to_dict(), lambda: plan_table(single, gpu), as_json)


def _show(data: dict[str, Any], table: Callable[[], Table], as_json: bool) -> None:
    """Print `data` as JSON, or the table."""
    if as_json:
        emit(json.dumps(data))
    else:
        emit(table())


@app.command()
def inspect(
    path: opts.InspectedPath, verify: opts.Verify = False, as_json: opts.Json = False
) -> None:
    """Show what a file or a model contains, and with --verify whether it is intact."""
    from lowvram.cli.progress import verify_progress
    from lowvram.cli.report_tables import inspect_table
    from lowvram.store.inspect import inspect_path

    _check_readable(path)
    with verify_progress(console) as listener:
        report = inspect_path(path, verify, listener)
    _show(report, lambda: inspect_table(report), as_json)


@app.command()
def doctor(
    as_json: opts.Json = False,
    path: opts.DoctorFolder = Path("."),
    refresh: opts.Refresh = False,
) -> None:
    """Report GPU, Triton, kernels, disk, memory and speeds, with advice on what is missing."""
    from lowvram.cli.report_tables import doctor_table
    from lowvram.doctor.read_speed import read_speed
    from lowvram.doctor.report import check_folder, checked_kernels, doctor_report, measured_speeds
    from lowvram.hardware.machine import probe_machine

    check_folder(path)
    machine = probe_machine(path, measure=True, disk_speed=read_speed)
    # Kernels before speeds: the check decides which kernels run, and those are measured.
    kernels = checked_kernels(machine, refresh)
    report = doctor_report(path, machine, measured_speeds(path, machine, refresh), kernels)
    _show(report, lambda: doctor_table(report), as_json)


def main() -> None:
    """Run the command line: the entry point of the `lowvram` script."""
    accept_every_character()
    app()
