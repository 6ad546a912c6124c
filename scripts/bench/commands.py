"""One benchmark at length: lowvram's kernels, a whole DiT block or denoising steps, beside what
people use today, on a CUDA machine.

    python -m scripts.bench kernels [--tokens 8192 32760 75600] [--only attention]
    python -m scripts.bench block [--size 832x480]
    python -m scripts.bench stream [--layers 40] [--sizes 832x480] [--vram 24 12 8 6] [--ram 40 16 6] [--only lowvram]
    python -m scripts.bench stream --device cpu --layers 1 --sizes 64x64 --frames 9

The tests on the GPU run first: no speed is reported where a kernel is wrong. Writes the raw numbers
as CSV, row by row, and a plot into docs/benchmarks, named after the GPU; `stream` adds its rows to
those of the same commit, so that it can be run in parts, and says how its goals stand. Medians of
20 calls after 3 to warm up, random data, inputs in rotation.

`stream --device cpu` is a rehearsal of the whole command without a GPU: no test runs first, nothing
that it writes is a result, and its files, named after the processor, lie in build/rehearsal.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from scripts.bench import ROOT
from scripts.bench.plots import bars, write_svg
from scripts.bench.timing import machine, peaks, rate_bars, require_cuda, table, write_csv

OUTPUT, REHEARSAL = ROOT / "docs" / "benchmarks", ROOT / "build" / "rehearsal"
CUDA = torch.device("cuda")
A14B_LAYERS = 40
KERNEL_TESTS, MEMORY_TESTS = "tests/gpu/test_kernels.py", "tests/gpu/test_memory.py"
# What a failure of each means.
CAUSES = {
    KERNEL_TESTS: "a kernel disagrees with its reference on this GPU, or does not run",
    MEMORY_TESTS: "a run takes more memory than its plan says, its frames depend on the plan, or "
    "it does not run",
}
GATES = {
    "kernels": (KERNEL_TESTS,),
    "block": (KERNEL_TESTS,),
    "stream": (KERNEL_TESTS, MEMORY_TESTS),
}
# Packages beside torch. A command imports no other's: a machine for measuring may have little else.
NEEDS = {
    "kernels": ("triton", "pytest"),
    "block": ("triton", "pytest", "diffusers", "optimum", "safetensors", "msgspec"),
    "stream": (
        "triton",
        "pytest",
        "diffusers",
        "optimum",
        "safetensors",
        "av",
        "ftfy",
        "tokenizers",
        "psutil",
        "msgspec",
    ),
}


def installed(command: str, without: Sequence[str] = ()) -> bool:
    """Whether this machine has the packages that the command needs, but for `without`; says in one
    line which it lacks.
    """
    missing = [name for name in NEEDS[command] if name not in without and find_spec(name) is None]
    if missing:
        print(
            f"bench {command}: not installed here: {', '.join(missing)}; `pip install -e "
            f".[dev]` installs them",
            file=sys.stderr,
        )
    return not missing


def gate(files: Sequence[str]) -> bool:
    """Whether these files of tests pass on this GPU; says which one does not."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOWVRAM_BACKEND", "LOWVRAM_PV", "TRITON_INTERPRET")
    }
    for file in files:
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", file], cwd=ROOT, env=environment
        ).returncode
        if code:
            cause = (
                f"failed: {CAUSES[file]}"
                if code == 1
                else f"could not run (pytest ended with {code})"
            )
            print(f"bench: {file} {cause}; no speed is reported", file=sys.stderr)
            return False
    return True


def gpu_name() -> str:
    return in_file_names(machine()[0])


def in_file_names(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def kernels(options: argparse.Namespace) -> int:
    from scripts.bench.kernels import all_benches, rows_of

    measured = peaks()
    print(
        "measured peaks: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in measured.items())
        + " (TOPS, TOPS, GB/s)"
    )
    benches = [
        bench
        for bench in all_benches(tuple(options.tokens))
        if options.only in f"{bench.op} {bench.shape}"
    ]
    path, rows = OUTPUT / f"kernels-{gpu_name()}.csv", []
    try:
        for bench in benches:
            for row in rows_of(bench, measured):
                rows.append(row)
                write_csv(path, rows)  # what a run that is cut off has measured stays
                print(
                    f"{row.op} {row.shape} {row.provider}: {row.median_ms:.3f} ms, "
                    f"{row.rate:.0f} {row.unit}",
                    flush=True,
                )
    finally:
        if rows:
            write_svg(
                path.with_suffix(".svg"), bars(f"{rows[0].gpu}, {rows[0].commit}", rate_bars(rows))
            )
    if not rows:
        print("bench: nothing was measured", file=sys.stderr)
        return 1
    print(table(rows))
    return 0


def block(options: argparse.Namespace) -> int:
    from lowvram_kernels.tuning import architecture, pv_choices

    from lowvram.request import latent_shape
    from lowvram.variants import T2V_A14B
    from scripts.bench.block import results

    width, height = map(int, options.size.split("x"))
    grid = latent_shape(T2V_A14B, width, height, options.frames).grid
    rows = []
    for row in results(
        T2V_A14B, grid, ("int8", "int8-plain", "fp8"), "cuda", pv_choices(architecture(CUDA))
    ):
        rows.append(row)
        write_csv(OUTPUT / f"block-{gpu_name()}.csv", rows)
        values = asdict(row).items()
        print(
            "  ".join(
                f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in values
            ),
            flush=True,
        )
    return 0


def streamed(options: argparse.Namespace) -> int:
    from scripts.bench.stream import stream
    from scripts.bench.stream_rows import machine_of

    folder = options.output or (REHEARSAL if options.device == "cpu" else OUTPUT)
    return stream(options, folder / f"stream-{in_file_names(machine_of(options.device)[0])}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kernels", help="every op at A14B shapes")
    one.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[8192, 32760, 75600],
        help="attention and element-wise ops take the last two",
    )
    one.add_argument("--only", default="", help="only rows whose op or shape contains this")
    two = commands.add_parser("block", help="a whole A14B block against diffusers'")
    two.add_argument("--size", default="832x480")
    two.add_argument("--frames", type=int, default=81)
    three = commands.add_parser(
        "stream", help="denoising steps within capped budgets, at true A14B shapes"
    )
    three.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "stream",
        help="where the random store is written, 30 GB; kept for the next run",
    )
    three.add_argument(
        "--layers",
        type=int,
        default=A14B_LAYERS,
        help="fewer blocks per expert: less disk, shorter steps",
    )
    three.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    three.add_argument("--frames", type=int, default=81)
    three.add_argument(
        "--steps", type=int, default=4, help="at least 2; the second half is the second expert's"
    )
    three.add_argument(
        "--vram",
        nargs="*",
        type=float,
        default=[24, 12, 8, 6],
        help="GB, beside everything resident",
    )
    three.add_argument("--ram", nargs="+", type=float, default=[40, 16, 6], help="GB")
    three.add_argument(
        "--only",
        default="",
        help="only providers whose name contains this: lowvram, resident, offloading, quanto",
    )
    three.add_argument("--no-baselines", action="store_true", help="lowvram alone")
    three.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: a rehearsal of the command, whose numbers mean nothing",
    )
    three.add_argument(
        "--output",
        type=Path,
        help="the folder of the results: docs/benchmarks, or build/rehearsal on a CPU",
    )
    return parser


def main(arguments: list[str]) -> int:
    options = make_parser().parse_args(arguments)
    if getattr(options, "device", "cuda") == "cpu":
        if not installed(options.command, without=("triton", "pytest")):
            return 1
    elif (
        require_cuda(f"bench {options.command}")
        and installed(options.command)
        and gate(GATES[options.command])
    ):
        # a refusal must stop the benchmark, not send it to the torch reference
        os.environ["LOWVRAM_BACKEND"] = "triton"
    else:
        return 1
    with torch.no_grad():
        return {"kernels": kernels, "block": block, "stream": streamed}[options.command](options)
