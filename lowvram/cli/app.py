"""The command line: one function per subcommand; each parses, calls and prints."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lowvram.cli import options as opts
from lowvram.cli.commands import Commands
from lowvram.cli.first_checks import (
    check_lora,
    check_model,
    check_readable,
    check_source,
    chosen_size,
    locked_output,
    read_prompt,
)
from lowvram.cli.terminal import (
    PrintableFormatter,
    accept_every_character,
    emit,
    make_console,
    printable,
    reported_output_errors,
)
from lowvram.errors import UsageError
from lowvram.variants import EXPERTS

if TYPE_CHECKING:
    from rich.table import Table

console = make_console(stderr=True)


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
    progress: opts.ProgressStyle = "bar",
) -> None:
    """Quantize the small bundled model and generate a video with it; runs on any machine."""
    from lowvram.encoder import check_encoder

    check_encoder()
    from lowvram.cli.progress import duration, generation_progress
    from lowvram.demo.run import is_own_clip, run_demo

    replaced = overwrite or is_own_clip(out)
    with locked_output(out, replaced, resume=False) as path:
        with generation_progress(console, progress) as listener:
            result = run_demo(prompt, seed, format, listener)
        result.video.save(path, overwrite=replaced, scale=result.scale)
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
    allow_links: opts.AllowLinks = False,
    lora: opts.Lora = None,
    lora_high: opts.LoraHigh = None,
    lora_low: opts.LoraLow = None,
    overwrite: opts.Overwrite = False,
    progress: opts.ProgressStyle = "bar",
    as_json: opts.Json = False,
) -> None:
    """Quantize a checkpoint into a model for streaming, in bounded memory; resumable."""
    check_source(source, model)
    for text in [*(lora or []), *(lora_high or []), *(lora_low or [])]:
        check_lora(text)
    from lowvram_quantize.convert import quantize as convert
    from lowvram_quantize.report import summary_table

    from lowvram.cli.progress import quantize_progress
    from lowvram.lora.file import parse_choice

    with quantize_progress(console, progress) as listener:
        report = convert(
            source,
            model,
            format,
            resume=resume,
            allow_pickle=allow_pickle,
            allow_links=allow_links,
            loras=[
                *(parse_choice(text) for text in lora or []),
                *(parse_choice(text, EXPERTS[:1]) for text in lora_high or []),
                *(parse_choice(text, EXPERTS[1:]) for text in lora_low or []),
            ],
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
    noise_device: opts.NoiseDevice = "cpu",
    solver: opts.Solver = "unipc",
    refine_steps: opts.RefineSteps = 0,
    vram: opts.Vram = "auto",
    ram: opts.Ram = "auto",
    device: opts.Device = "auto",
    resume: opts.ResumeGenerate = False,
    out: opts.Out = None,
    fps: opts.Fps = None,
    scale: opts.Scale = 1,
    metadata: opts.Metadata = "full",
    overwrite: opts.Overwrite = False,
    prompt_cache: opts.PromptCache = True,
    lora: opts.LoraAtRunTime = None,
    allow_links: opts.AllowLinks = False,
    progress: opts.ProgressStyle = "bar",
    as_json: opts.Json = False,
) -> None:
    """Generate a video within VRAM and RAM budgets."""
    from lowvram.encoder import check_encoder
    from lowvram.hardware.budgets import check_budgets

    if lora:
        raise UsageError(
            f"LoRAs are merged when a model is quantized, not at run time yet: lowvram quantize "
            f"SOURCE MODEL --lora {lora[0]}"
        )
    text, pixels = read_prompt(prompt, prompt_file), chosen_size(size, width, height)
    check_model(model)
    check_budgets(vram, ram)
    check_encoder()
    with locked_output(out, overwrite, resume) as path:
        from lowvram.cli.generate import Output, drawn_seed, run
        from lowvram.pipeline import load

        pipeline = load(model, vram, ram, device, prompt_cache, allow_links)
        request = pipeline.request(
            text,
            negative_prompt=negative_prompt,
            size=pixels,
            frames=frames,
            fps=fps,
            steps=steps,
            shift=shift,
            guidance_high=guidance if guidance_high is None else guidance_high,
            guidance_low=guidance if guidance_low is None else guidance_low,
            seed=drawn_seed(path, resume, console) if seed == -1 else seed,
            noise_device=noise_device,
            solver=solver,
            refine_steps=refine_steps,
        )
        output = Output(path, overwrite, resume, scale, metadata, progress, as_json)
        run(pipeline, request, output, console)


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
    from lowvram.cli.plan_tables import budget_note, matrix_table, plan_table
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
        _show(single.to_dict(), lambda: plan_table(single, gpu, budget_note(gpu, vram)), as_json)


def _show(data: dict[str, Any], table: Callable[[], Table], as_json: bool) -> None:
    """Print `data` as JSON, or the table."""
    if as_json:
        emit(json.dumps(data))
    else:
        emit(table())


@app.command()
def inspect(
    path: opts.InspectedPath,
    verify: opts.Verify = False,
    allow_links: opts.AllowLinks = False,
    progress: opts.ProgressStyle = "bar",
    as_json: opts.Json = False,
) -> None:
    """Show what a file or a model contains, and with --verify whether it is intact."""
    from lowvram.cli.progress import verify_progress
    from lowvram.cli.report_tables import inspect_table
    from lowvram.store.inspect import inspect_path

    check_readable(path)
    with verify_progress(console, progress) as listener:
        report = inspect_path(path, verify, listener, allow_links)
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
    with reported_output_errors():
        app()
