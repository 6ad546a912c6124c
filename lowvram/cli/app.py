"""The command line: one function per subcommand; each parses, calls and prints."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from lowvram.errors import LowvramError, OutputError, UsageError

if TYPE_CHECKING:
    from lowvram.pipeline import Pipeline, Video

console = Console(stderr=True)


class Commands(TyperGroup):
    """Exit codes: 0 done, 1 failed (one line; `--debug` for the traceback), 2 wrong usage, 130
    interrupted.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LowvramError as error:
            if ctx.params.get("debug"):
                raise
            console.print(
                f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False
            )
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            console.print("interrupted")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    help="All of Wan2.2 A14B on one consumer GPU, within the VRAM and RAM you name.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for scripts.")]
Vram = Annotated[str, typer.Option(help="VRAM budget: 8GiB, 8GB, 8192MiB or auto.")]
Ram = Annotated[str, typer.Option(help="RAM budget: 16GiB, 16GB or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Format = Annotated[
    str,
    typer.Option("--format", help="int8 (rotated, the default), int8-plain, fp8, bf16 or fp32."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log decisions such as the backend of each op.")
    ] = False,
) -> None:
    """Options that stand before the subcommand."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s"
    )


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="The video to write; replaces a clip of lowvram's.", readable=False)
    ] = Path("demo.mp4"),
    prompt: Annotated[
        str, typer.Option(help="What the video shows.")
    ] = "a red circle moves right on a white background",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    format: Format = "int8",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace whatever file is there.")
    ] = False,
) -> None:
    """Quantize the small model that ships with lowvram and generate a video with it, on any
    machine.
    """
    from lowvram.cli.terminal import duration, generation_progress
    from lowvram.demo.run import is_own_clip, run_demo
    from lowvram.video import check_output

    check_output(out, overwrite or is_own_clip(out))
    with generation_progress(console) as listener:
        result = run_demo(prompt, seed, format, listener)
    result.video.save(out, overwrite=overwrite or is_own_clip(out), scale=result.scale)
    console.print(
        f"quantized in {duration(result.quantize_s)}, generated in "
        f"{duration(result.generate_s)}: “{prompt}”"
    )
    print(out)


@app.command()
def quantize(
    source: Annotated[
        Path,
        typer.Argument(help="Checkpoint folder: official or diffusers layout.", readable=False),
    ],
    model: Annotated[
        Path, typer.Argument(help="Folder of the quantized model to write.", readable=False)
    ],
    format: Format = "int8",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pth files (weights only).")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into a store that streams; bounded memory, resumable."""
    from lowvram_quantize.convert import quantize as convert
    from lowvram_quantize.report import summary_table

    from lowvram.cli.terminal import quantize_progress

    _check_readable(source)
    _check_readable(model)
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
        print(report.to_json(), end="")
        return
    Console().print(summary_table(report))
    print(model)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a quantized model.", readable=False)],
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text file that holds the prompt.", readable=False)
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What it must not show; the official text by default.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4n+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    shift: Annotated[float | None, typer.Option(help="Flow shift of the schedule.")] = None,
    guidance_high: Annotated[
        float | None, typer.Option(help="Guidance of the high-noise expert.")
    ] = None,
    guidance_low: Annotated[
        float | None, typer.Option(help="Guidance of the low-noise expert.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; -1 draws one.")] = 0,
    solver: Annotated[str, typer.Option(help="unipc or euler.")] = "unipc",
    vram: Vram = "auto",
    ram: Ram = "auto",
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of the same request.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The video to write, .mp4.", readable=False)] = Path(
        "clip.mp4"
    ),
    scale: Annotated[
        int,
        typer.Option(help="Enlarge each pixel of the saved video this many times.", min=1, max=16),
    ] = 1,
    overwrite: Overwrite = False,
    prompt_cache: Annotated[
        bool,
        typer.Option(
            "--prompt-cache/--no-prompt-cache", help="Keep encoded prompts for the next run."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Generate a video within the budgets you name."""
    from lowvram.cli.terminal import (
        PhaseTimer,
        compared_peaks,
        compared_times,
        generation_progress,
        peaks_table,
        plan_line,
        times_table,
    )
    from lowvram.memory.usage import PhasePeaks
    from lowvram.pipeline import load
    from lowvram.video import check_output

    check_output(out, overwrite)
    text = _prompt(prompt, prompt_file)
    _check_readable(model)
    pipeline = load(model, vram, ram, device, prompt_cache)
    settings = {
        "negative_prompt": negative_prompt,
        "size": size,
        "frames": frames,
        "steps": steps,
        "shift": shift,
        "guidance_high": guidance_high,
        "guidance_low": guidance_low,
        "seed": secrets.randbelow(2**31) if seed == -1 else seed,
        "solver": solver,
    }
    request = pipeline.request(text, **settings)
    plan = pipeline.plan(request)
    console.print(plan_line(plan))
    with generation_progress(console) as listener:
        timer = PhaseTimer(listener)
        peaks = PhasePeaks(timer, pipeline.device.type, pipeline.host.context_bytes)
        video = _resumable(pipeline, request, plan, out, resume, peaks)
        memory = compared_peaks(plan, peaks.by_phase)
        video.save(out, overwrite=overwrite, scale=scale)
    _forget_state(out)
    times = compared_times(plan.prediction, timer)
    if as_json:
        facts = {
            "out": str(out),
            "request": video.request.__dict__,
            "peak_bytes": video.peak_bytes,
            "plan": plan.to_dict(),
        }
        print(
            json.dumps(
                facts
                | {
                    "memory": memory,
                    "seconds": times,
                    "prompt_tokens": pipeline.prompt_tokens(request),
                }
            )
        )
        return
    console.print(peaks_table(memory))
    if plan.prediction is not None:
        console.print(times_table(plan.prediction, times))
    print(out)


def _resumable(
    pipeline: Pipeline, request: Any, plan: Any, out: Path, resume: bool, listener: Any
) -> Video:
    from lowvram.sampling.state import state_path

    state = state_path(out)
    if state.exists() and not resume:
        raise OutputError(
            f"{state} is left of an interrupted run: continue it with --resume, or remove it"
        )
    try:
        return pipeline.generate(
            request, plan=plan, state_file=state, resume=resume, listener=listener
        )
    except KeyboardInterrupt:
        if state.exists():
            console.print(
                f"interrupted; the finished steps are in {state}: run the same command with "
                f"--resume"
            )
        raise


def _forget_state(out: Path) -> None:
    from lowvram.sampling.state import state_path

    state_path(out).unlink(missing_ok=True)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give either --prompt TEXT or --prompt-file FILE")
    if prompt_file is None:
        return prompt or ""
    try:
        # Windows' editors begin a file with a byte order mark
        return prompt_file.read_text(encoding="utf-8-sig")
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
    """Raises `LowvramError` where this user may not read `path`; a missing one is for the command
    itself to refuse.
    """
    try:
        needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        allowed = not path.exists() or os.access(path, needed)
    except OSError as error:  # a folder above it may not be entered, a name is too long
        raise LowvramError(
            f"cannot read {path}: {error.strerror}: check its name, its owner and its rights"
        ) from error
    if not allowed:
        raise LowvramError(f"cannot read {path}: Permission denied: check its owner and its rights")


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="Folder of a quantized model, or a variant such as t2v-a14b.")
    ],
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels; without one, a matrix of sizes and lengths."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 4n+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            help="VRAM budget: 8GiB, 8GB or auto; without one auto with --gpu, else 8GiB."
        ),
    ] = None,
    ram: Ram = "16GiB",
    format: Format = "int8",
    gpu: Annotated[
        str | None,
        typer.Option(
            help='A card whose time is predicted, such as "RTX 3060 12GB"; this machine\'s by '
            "default."
        ),
    ] = None,
    link: Annotated[
        str | None, typer.Option(help='Its link, such as "PCIe 3.0 x8" or 12GB a second.')
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="The disk's speed, such as 3.5GB a second.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Peak memory and predicted time of a run, computed without a GPU; without --size, what fits at
    all.
    """
    from lowvram.cli import terminal
    from lowvram.plans import api as planning

    if size is None:
        matrix = planning.plan_matrix(
            model,
            frames=frames,
            steps=steps,
            vram=vram,
            ram=ram,
            format=format,
            gpu=gpu,
            link=link,
            disk=disk,
        )
        _show(matrix.to_dict(), lambda: terminal.matrix_table(matrix), as_json)
        return
    made = planning.plan(
        model,
        size=size,
        frames=frames,
        steps=steps,
        vram=vram,
        ram=ram,
        format=format,
        gpu=gpu,
        link=link,
        disk=disk,
    )
    _show(made.to_dict(), lambda: terminal.plan_table(made, gpu), as_json)


def _show(data: dict[str, Any], table: Callable[[], Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(data))
    else:
        Console().print(table())


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, a checkpoint folder or a quantized model.", readable=False
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every tensor against the manifest.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a file or a model is, and whether it is whole."""
    from lowvram.cli.terminal import inspect_table, verify_progress
    from lowvram.store.inspect import inspect_path

    _check_readable(path)
    with verify_progress(console) as listener:
        found = inspect_path(path, verify, listener)
    if as_json:
        print(json.dumps(found))
    else:
        Console().print(inspect_table(found))


@app.command()
def doctor(
    as_json: Json = False,
    path: Annotated[
        Path, typer.Option(help="The folder whose disk is looked at.", readable=False)
    ] = Path("."),
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Check the kernels and measure the machine's speeds again."),
    ] = False,
) -> None:
    """GPU, Triton, kernels, disk, memory, speeds: what is there, what is missing and how to get
    it.
    """
    from lowvram.cli.terminal import doctor_table
    from lowvram.doctor.read_speed import read_speed
    from lowvram.doctor.report import check_folder, checked_kernels, doctor_report, measured_speeds
    from lowvram.hardware.machine import probe_machine

    check_folder(path)
    machine = probe_machine(path, measure=True, disk_speed=read_speed)
    kernels = checked_kernels(machine, refresh)  # first: the speeds are those of what runs
    report = doctor_report(path, machine, measured_speeds(path, machine, refresh), kernels)
    _show(report, lambda: doctor_table(report), as_json)


def main() -> None:
    """Runs the command line."""
    app()
