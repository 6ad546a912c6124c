"""Measures lowvram's kernels, or a whole DiT block, beside what people use today, on a CUDA machine.

    python scripts/bench.py kernels [--tokens 8192 32760 75600] [--only attention]
    python scripts/bench.py block [--size 832x480]
    python scripts/bench.py stream [--layers 40] [--vram 24 12 8 6] [--ram 40 16 6]

The tests on the GPU run first: no speed is reported where a kernel is wrong. Writes the raw numbers as CSV and a plot into
docs/benchmarks, named after the GPU. Medians of 20 calls after 3 to warm up, random data, inputs in rotation.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from bench_stream import add_arguments, stream
from bench_timing import ROOT, machine, peaks, rate_bars, require_cuda, table, write_csv
from plots import bars, write_svg

OUTPUT = ROOT / "docs" / "benchmarks"
CUDA = torch.device("cuda")


def gate() -> bool:
    """Whether the kernels agree with their references on this GPU."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOWVRAM_BACKEND", "LOWVRAM_PV", "TRITON_INTERPRET")}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], cwd=ROOT, env=environment)
    if result.returncode:
        cause = "a kernel disagrees with its reference on this GPU" if result.returncode == 1 else "tests/gpu could not run"
        print(f"bench: {cause}, so no speed is reported", file=sys.stderr)
    return result.returncode == 0


def gpu_name() -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine()[0].lower()).strip("-")


def kernels(options: argparse.Namespace) -> int:
    from bench_kernels import all_benches, rows_of

    measured = peaks()
    print("measured peaks: " + ", ".join(f"{name} {rate:.0f}" for name, rate in measured.items()) + " (TOPS, TOPS, GB/s)")
    benches = [bench for bench in all_benches(tuple(options.tokens)) if options.only in f"{bench.op} {bench.shape}"]
    rows = [row for bench in benches for row in rows_of(bench, measured)]
    if not rows:
        print("bench: nothing was measured", file=sys.stderr)
        return 1
    write_csv(OUTPUT / f"kernels-{gpu_name()}.csv", rows)
    write_svg(OUTPUT / f"kernels-{gpu_name()}.svg", bars(f"{rows[0].gpu}, {rows[0].commit}", rate_bars(rows)))
    print(table(rows))
    return 0


def block(options: argparse.Namespace) -> int:
    from bench_block import results
    from lowvram_kernels.tuning import architecture, pv_choices

    from lowvram.config import T2V_A14B, latent_shape

    width, height = map(int, options.size.split("x"))
    grid = latent_shape(T2V_A14B, width, height, options.frames).grid
    rows = [asdict(result) for result in results(T2V_A14B, grid, ("int8", "int8-plain", "fp8"), "cuda", pv_choices(architecture(CUDA)))]
    for row in rows:
        row.update(zip(("gpu", "torch", "commit"), machine(), strict=True))
    path: Path = OUTPUT / f"block-{gpu_name()}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    return 0


def streamed(options: argparse.Namespace) -> int:
    return stream(options, OUTPUT / f"stream-{gpu_name()}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("kernels", help="every op at A14B shapes")
    one.add_argument("--tokens", nargs="+", type=int, default=[8192, 32760, 75600], help="attention and element-wise ops take the last two")
    one.add_argument("--only", default="", help="only rows whose op or shape contains this")
    two = commands.add_parser("block", help="a whole A14B block against diffusers'")
    two.add_argument("--size", default="832x480")
    two.add_argument("--frames", type=int, default=81)
    three = commands.add_parser("stream", help="denoising steps within capped budgets, at true A14B shapes")
    add_arguments(three)
    options = parser.parse_args(arguments)
    if not require_cuda(f"bench.py {options.command}"):
        return 1
    if not gate():
        return 1
    os.environ["LOWVRAM_BACKEND"] = "triton"  # a refusal must stop the benchmark, not send it to the torch reference
    with torch.no_grad():
        return {"kernels": kernels, "block": block, "stream": streamed}[options.command](options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
