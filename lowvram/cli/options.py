"""Arguments and options of the subcommands, as annotated types for typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowvram.cli.terminal import emit

# Panels of the help.
PROMPT = "What the video shows"
VIDEO = "The video"
SAMPLING = "Sampling"
MACHINE = "The machine"
SCRIPTS = "How it runs"

# Input and output paths: readable=False because the commands report unreadable paths themselves.
Source = Annotated[
    Path, typer.Argument(help="Checkpoint folder: official or diffusers layout.", readable=False)
]
NewModel = Annotated[
    Path, typer.Argument(help="Folder of the quantized model to write.", readable=False)
]
Model = Annotated[Path, typer.Argument(help="Folder of a quantized model.", readable=False)]
ModelOrVariant = Annotated[
    str, typer.Argument(help="Folder of a quantized model, or a variant such as t2v-a14b.")
]
InspectedPath = Annotated[
    Path,
    typer.Argument(
        help="A .safetensors file, a checkpoint folder or a quantized model.", readable=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        rich_help_panel=VIDEO,
        metavar="FILE",
        help="Output video, .mp4; default: clip.mp4, clip-2.mp4, …",
        readable=False,
    ),
]
DemoOut = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Output video; a clip written by lowvram is replaced.", readable=False
    ),
]
DoctorFolder = Annotated[
    Path, typer.Option("--path", help="Folder whose disk is checked.", readable=False)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=VIDEO, help="Replace an existing output.")
]
DemoOverwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing file of any kind.")
]

# The prompt.
DemoPrompt = Annotated[str, typer.Option("--prompt", "-p", help="What the video shows.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", "-p", rich_help_panel=PROMPT, metavar="TEXT", help="What the video shows."
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=PROMPT,
        metavar="FILE",
        help="Text file that contains the prompt; - for standard input.",
        readable=False,
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PROMPT,
        metavar="TEXT",
        help="What the video must not show; default: the official negative prompt.",
    ),
]
PromptCache = Annotated[
    bool,
    typer.Option(
        "--prompt-cache/--no-prompt-cache",
        rich_help_panel=PROMPT,
        help="Cache encoded prompts for later runs.",
    ),
]

# The video and its sampling.
Size = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=VIDEO,
        metavar="WxH",
        help="WIDTHxHEIGHT in pixels, multiples of 16; or 480p, 720p. Default of A14B: 1280x720.",
    ),
]
Width = Annotated[
    int | None,
    typer.Option(rich_help_panel=VIDEO, metavar="N", help="Width in pixels, with --height."),
]
Height = Annotated[
    int | None,
    typer.Option(rich_help_panel=VIDEO, metavar="N", help="Height in pixels, with --width."),
]
PlannedSize = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=VIDEO,
        metavar="WxH",
        help="WIDTHxHEIGHT in pixels, or 480p, 720p; without it, a matrix of sizes and lengths.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        "--num-frames",
        rich_help_panel=VIDEO,
        metavar="N",
        help="Number of frames, 4n+1. Default of A14B: 81.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="N",
        help="Number of denoising steps. Default of A14B: 40.",
    ),
]
Shift = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="X",
        help="Flow shift of the schedule. Default of A14B: 12.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="X",
        help="Guidance scale of both experts; 1 computes one branch.",
    ),
]
GuidanceHigh = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="X",
        help="Guidance scale of the high-noise expert. Default of A14B: 4.",
    ),
]
GuidanceLow = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="X",
        help="Guidance scale of the low-noise expert. Default of A14B: 3.",
    ),
]
Seed = Annotated[int, typer.Option(rich_help_panel=VIDEO, metavar="N", help="Seed of the noise.")]
SeedOrRandom = Annotated[
    int,
    typer.Option(
        rich_help_panel=VIDEO, metavar="N", help="Seed of the noise; -1 picks a random one."
    ),
]
Solver = Annotated[
    str, typer.Option(rich_help_panel=SAMPLING, metavar="NAME", help="unipc or euler.")
]
NoiseDevice = Annotated[
    str,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="NAME",
        help="Where the seed's noise is drawn. cpu: as ComfyUI does, the same everywhere; cuda: as "
        "the official code does.",
    ),
]
Fps = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=VIDEO, metavar="N", help="Frames per second of the file. Default: 16."
    ),
]
Metadata = Annotated[
    Literal["full", "label"],
    typer.Option(
        rich_help_panel=VIDEO,
        metavar="KIND",
        help="full: prompt and settings in the file; label: only that it is AI-generated.",
    ),
]
Scale = Annotated[
    int,
    typer.Option(
        rich_help_panel=VIDEO,
        metavar="N",
        help="Enlarge each pixel of the saved video this many times.",
        min=1,
        max=16,
    ),
]

RefineSteps = Annotated[
    int,
    typer.Option(
        rich_help_panel=SAMPLING,
        metavar="N",
        help="Compute this many of the last steps more exactly, which takes longer; int8 models.",
    ),
]

# The machine and the format.
Vram = Annotated[
    str,
    typer.Option(
        rich_help_panel=MACHINE, metavar="SIZE", help="VRAM budget: 8GiB, 8GB, 8192MiB or auto."
    ),
]
PlannedVram = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE,
        metavar="SIZE",
        help="VRAM budget: 8GiB, 8GB or auto; default: auto with --gpu, else 8GiB.",
    ),
]
Ram = Annotated[
    str,
    typer.Option(rich_help_panel=MACHINE, metavar="SIZE", help="RAM budget: 16GiB, 16GB or auto."),
]
Device = Annotated[
    str, typer.Option(rich_help_panel=MACHINE, metavar="NAME", help="auto, cpu, cuda or cuda:N.")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="int8 (rotated, the default), int8-plain, fp8, bf16 or fp32.",
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE,
        metavar="NAME",
        help='Card to predict times for, such as "RTX 3060 12GB"; default: this machine.',
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE,
        metavar="SPEED",
        help='Link of the card: "PCIe 3.0 x8", or bytes per second: 12GB.',
    ),
]
Disk = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE,
        metavar="SPEED",
        help="Speed of the disk in bytes per second: 3.5GB.",
    ),
]

# How a command runs and what it prints.
ResumeQuantize = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
ResumeGenerate = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=SCRIPTS, help="Continue an interrupted run of the same request."
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .pth files (weights only).")
]
AllowLinks = Annotated[
    bool,
    typer.Option(
        "--allow-links",
        rich_help_panel=MACHINE,
        help="Follow links out of the model's folder, such as to another disk.",
    ),
]
ProgressStyle = Annotated[
    Literal["bar", "json"],
    typer.Option(
        "--progress",
        rich_help_panel=SCRIPTS,
        metavar="STYLE",
        help="bar, or json: a line per event on standard error.",
    ),
]
_LORA = "LoRA to merge before quantizing, FILE or FILE:STRENGTH; may be repeated."
Lora = Annotated[list[str] | None, typer.Option("--lora", metavar="FILE", help=_LORA)]
LoraAtRunTime = Annotated[list[str] | None, typer.Option("--lora", hidden=True)]
LoraHigh = Annotated[
    list[str] | None,
    typer.Option("--lora-high", metavar="FILE", help="The same for the high-noise expert alone."),
]
LoraLow = Annotated[
    list[str] | None,
    typer.Option("--lora-low", metavar="FILE", help="The same for the low-noise expert alone."),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the hash of every tensor against the manifest.")
]
Refresh = Annotated[
    bool,
    typer.Option("--refresh", help="Check the kernels and measure the machine's speeds again."),
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=SCRIPTS, help="Print one JSON object for scripts.")
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        emit(f"lowvram {version('lowvram')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors, no progress.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Log decisions such as the backend of each op."),
]
