"""All of A14B at its true size, on a CPU, within budgets that the kernel enforces: what `lowvram
generate` takes and how long it runs.

    python -m scripts.bench whole --work build/whole                # 37 GB of random int8 weights, then a run per pair of budgets
    python -m scripts.bench whole --work build/whole --layers 2     # two blocks per expert, a text encoder of one

Both experts, the UMT5-XXL encoder and the VAE have the real shapes; the weights are random, so the
clip shows nothing. Each run is the command line in a process of its own, in a control group whose
limit is the two budgets added up: on a CPU both are host memory. Where it took more, the kernel
would kill it. Linux, as root. Adds a row per run to docs/benchmarks/whole.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowvram.checkpoint.names import dit_shapes, text_encoder_shapes, vae_shapes
from lowvram.doctor.measure import machine_profile
from lowvram.doctor.read_speed import read_speed
from lowvram.errors import LowvramError
from lowvram.store.reader import open_store
from lowvram.units import format_bytes, parse_bytes
from lowvram.variants import T2V_A14B, ModelConfig
from scripts.bench import ROOT
from scripts.bench.memory_group import NoGroupError, memory_group
from scripts.bench.random_store import bench_config, write_random_store
from scripts.bench.timing import machine, write_csv

GB = 10**9
OUTPUT = ROOT / "docs" / "benchmarks" / "whole.csv"
TOKENIZER = ROOT / "lowvram" / "demo" / "model" / "google" / "umt5-xxl" / "tokenizer.json"
PLANNED = ("text", "conditioning", "denoise", "decode")
# Runs a command and then prints the most bytes that it had resident, and how many it read from the
# disk.
WATCH = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_maxrss * "
    "1024, used.ru_inblock * 512); sys.exit(code)"
)
PROMPT = "a red circle moves right on a white background"
# Of which two steps are one of each expert.
SHIFT = "5"
# Everything resident first: what the others are compared with.
BUDGETS = ("15.5GB+3GB", "8GB+4GB", "1.5GB+1.6GB")


@dataclass(frozen=True)
class WholeRow:
    """One run. GB are 10^9 bytes; blocks: of one expert's, how many stay in the workspace ("VRAM")
    and in RAM, the others are read at every visit; seconds by phase, `predicted_` by the plan;
    overhead: of a step, against the first row. rss_gb: the most that was resident; plan_gb: the
    most that a phase may take by the plan, and the group that a run is held to has the budgets'
    sum; read_gb: from
    the disk in all, disk_gb_s: its speed before the first run.
    """

    size: str
    frames: int
    steps: int
    layers: int
    parameters: int
    vram_budget_gb: float
    ram_budget_gb: float
    resident: int
    ring: int
    host: int
    chunk: int
    joint: bool
    rss_gb: float
    plan_gb: float
    text_s: float
    conditioning_s: float
    denoise_s: float
    decode_s: float
    step_s: float
    overhead: float
    predicted_text_s: float
    predicted_conditioning_s: float
    predicted_denoise_s: float
    predicted_decode_s: float
    predicted_step_s: float
    read_gb: float
    disk_gb_s: float
    video_sha256: str
    threads: int
    torch: str
    commit: str


@dataclass(frozen=True)
class Clip:
    size: str
    frames: int
    steps: int


def whole_config(layers: int) -> ModelConfig:
    """A14B as it is; with fewer layers the shapes of its experts beside small other parts."""
    return T2V_A14B if layers == T2V_A14B.dit.num_layers else bench_config(layers)


def parameters(config: ModelConfig) -> int:
    """Weights, biases and norms of all components."""
    parts = (
        *2 * [dit_shapes(config.dit)],
        text_encoder_shapes(config.text_encoder),
        vae_shapes(config.vae),
    )
    return sum(math.prod(shape) for shapes in parts for shape in shapes.values())


def rows(store: Path, clip: Clip, budgets: Sequence[str], work: Path) -> Iterator[WholeRow]:
    """A row per pair of budgets. Raises `NoGroupError` where memory cannot be limited, `RunFailed`
    with a run's last words.
    """
    # by which plans are chosen and times predicted
    profile, _ = machine_profile(work, disk_bytes_s=read_speed(work))
    with open_store(store) as opened:
        config = opened.config
    resident_s: float | None = None
    for pair in budgets:
        vram, ram = pair.split("+")
        out = work / "clip.mp4"
        facts, rss_bytes, read_bytes = generate(store, clip, vram, ram, out)
        plan, seconds, predicted = (
            facts["plan"],
            facts["seconds"]["actual"],
            facts["seconds"]["predicted"],
        )
        resident_s = resident_s or seconds["step"]
        choice, (_, version, commit) = plan["choice"], machine()
        yield WholeRow(
            clip.size,
            clip.frames,
            clip.steps,
            config.dit.num_layers,
            parameters(config),
            parse_bytes(vram) / GB,
            parse_bytes(ram) / GB,
            choice["resident_blocks"],
            choice["ring_slots"],
            choice["host_blocks"],
            choice["chunk_tokens"],
            choice["joint_guidance"],
            rss_bytes / GB,
            max(phase["vram_bytes"] + phase["ram_bytes"] for phase in plan["phases"]) / GB,
            **{f"{name}_s": round(seconds[name], 3) for name in PLANNED},
            step_s=seconds["step"],
            overhead=seconds["step"] / resident_s - 1,
            **{f"predicted_{name}_s": round(predicted[name], 3) for name in PLANNED},
            predicted_step_s=predicted["step"],
            read_gb=read_bytes / GB,
            disk_gb_s=profile.disk_bytes_s / GB,
            video_sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
            threads=torch.get_num_threads(),
            torch=version,
            commit=commit,
        )


class RunFailed(Exception):
    """A run ended without a video, or the kernel killed it."""


def generate(
    store: Path, clip: Clip, vram: str, ram: str, out: Path
) -> tuple[dict[str, Any], int, int]:
    """What the command says as JSON, the most bytes that were resident, and those read, of one run
    held to both budgets together.
    """
    command = [
        sys.executable,
        "-m",
        "lowvram",
        "generate",
        str(store),
        "--prompt",
        PROMPT,
        "--no-prompt-cache",
        "--json",
        "--overwrite",
    ]
    command += [
        "--size",
        clip.size,
        "--frames",
        str(clip.frames),
        "--steps",
        str(clip.steps),
        "--shift",
        SHIFT,
        "--out",
        str(out),
    ]
    command += ["--device", "cpu", "--vram", vram, "--ram", ram]
    with memory_group(parse_bytes(vram) + parse_bytes(ram)) as group:
        done = group.run(
            [sys.executable, "-c", WATCH, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        kills = group.kills
    if done.returncode or kills:
        killed = f"killed {kills} times within {format_bytes(group.limit_bytes)}; " if kills else ""
        raise RunFailed(
            f"{vram} + {ram}: {killed}it ended with {done.returncode}: "
            f"{' '.join(done.stderr.split()[-60:])}"
        )
    facts, counted = done.stdout.splitlines()
    rss, read = counted.split()
    return json.loads(facts), int(rss), int(read)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "whole",
        help="where the random store is written and kept, 37 GB",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=T2V_A14B.dit.num_layers,
        help="fewer blocks per expert: less disk, shorter runs",
    )
    parser.add_argument("--size", default="320x192")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=2, help="an even number: half of them are the second expert's"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=BUDGETS,
        metavar="VRAM+RAM",
        help="others are compared with the first pair",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    folder = options.work / f"a14b-{options.layers}"
    if not (folder / "lowvram.json").exists():
        write_random_store(folder, whole_config(options.layers), TOKENIZER.read_bytes()).close()
    found: list[WholeRow] = []
    try:
        for row in rows(
            folder, Clip(options.size, options.frames, options.steps), options.budgets, options.work
        ):
            found.append(row)
            write_csv(options.output, found)
            within = f"{row.vram_budget_gb:.1f} + {row.ram_budget_gb:.1f} GB"
            print(
                f"{within}: {row.rss_gb:.2f} GB resident, {row.step_s:.1f} s per step, "
                f"{row.overhead:+.1%}",
                flush=True,
            )
    except (NoGroupError, RunFailed, LowvramError) as error:
        print(f"bench_whole.py: {error}", file=sys.stderr)
        return 1
    problems = [
        f"{row.rss_gb:.3f} GB were resident, {row.plan_gb:.3f} planned"
        for row in found
        if row.rss_gb > row.plan_gb
    ]
    if len({row.video_sha256 for row in found}) > 1:
        problems.append("the budgets changed the video")
    for problem in problems:
        print(f"bench_whole.py: {problem}", file=sys.stderr)
    return 1 if problems else 0
