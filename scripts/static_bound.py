"""Static bounds of the kernels: compiles them for GPUs that are not there, reads the machine code
of the hot loop and counts it.

    python -m scripts.static_bound [--arch sm_86 ...] [--kernel attention ...] [--peers FOLDER] [--pipes] [--calibrate]
    python -m scripts.static_bound --write        docs/benchmarks/static.csv, and the table in docs/benchmarks/kernels.md
    python -m scripts.static_bound --check        exit 1 where a bound of ours is more than 2 points below that of static.csv

Needs torch, numpy and Triton (its assembler and disassembler come with it), no GPU. Peers are
SageAttention 1 and comfy-kitchen, where they are installed or their wheels are unpacked in FOLDER:
`pip download --no-deps sageattention==1.0.6 comfy-kitchen==0.2.40`. The model and its
sources: `sass.py`. Nothing that it prints was measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lowvram_kernels.sizes import default_values

from scripts.sass import ARCHES, CARDS, PIPES, Loop, UnknownInstructionError, hot_loop

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks"
TABLE, DOCUMENT = BENCHMARKS / "static.csv", BENCHMARKS / "kernels.md"
BEGIN, END = "<!-- static table: begin -->", "<!-- static table: end -->"
OURS = (
    "linear int8 store",
    "linear int8 gelu",
    "linear int8 += gate * y",
    "linear fp8 store",
    "linear fp8 += gate * y",
    "attention int8",
    "attention fp16",
    "attention fp8",
    "attention bf16",
)
POINTS = 0.02  # of the tensor cores' peak, by which a bound may fall
SAGE = "sageattention 1.0.6"
# TOPS that were published for a kernel alone: SageAttention's charts; flash attention in Triton,
# H100 (triton pull requests 205, 206, 829).
PUBLISHED = {
    (SAGE, "sm_80"): 278,
    (SAGE, "sm_86"): 135,
    (SAGE, "sm_89"): 322,
    (SAGE, "sm_90"): 518,
    (SAGE, "sm_120"): 479,
    ("yardstick bf16 flash", "sm_90"): 476,
}


@dataclass(frozen=True)
class Bound:
    """One kernel on one architecture. ideal, serial: shares of the tensor cores' time (`sass`);
    limit: the longest pipe.

    blocks: that fit an SM, of `warps` warps; tops: at the serial bound on the architecture's card;
    cycles_: of one scheduler (lsu: of the SM) per trip of the hot loop and block; unclassified:
    opcodes that count as an issue slot alone.
    """

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_kb: float
    blocks: int
    warps: int
    ideal: float
    serial: float
    limit: str
    tops_ideal: float
    tops: float
    cycles_tensor: float
    cycles_issue: float
    cycles_fma: float
    cycles_alu: float
    cycles_xu: float
    cycles_lsu: float
    unclassified: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.arch

    @property
    def ours(self) -> bool:
        return self.kernel in OURS


Job = tuple[Any, tuple[str, ...]]  # a variant to compile, its arguments not divisible by 16


def jobs(arch: str, folder: Path | None, with_peers: bool) -> dict[str, Job]:
    """By name: a variant to compile, and its arguments that are not divisible by 16."""
    from scripts import compile_kernels, static_peers

    found: dict[str, Job] = {
        variant.name: (variant, ())
        for variant in compile_kernels.variants(arch)
        if variant.name in OURS
    }
    if with_peers:
        found |= {
            variant.name: (variant, unaligned)
            for variant, unaligned in static_peers.yardsticks(arch)
        }
        found |= {
            variant.name: (variant, unaligned) for variant, unaligned in static_peers.peers(folder)
        }
    return found


def bound_of(arch: str, name: str, folder: Path | None, with_peers: bool) -> Bound | str:
    """The bound, or why there is none. Runs in a process of its own pool: Triton's kernels do not
    travel between processes.
    """
    from scripts import compile_kernels

    variant, unaligned = jobs(arch, folder, with_peers)[name]
    try:
        result = compile_kernels.built(variant, arch, unaligned)
        registers, spilled, code = compile_kernels.disassembled(result.asm["cubin"])
        loop = hot_loop(code)
    except Exception as error:  # a peer's kernel may not compile here, whatever the compiler raises
        lines = str(error).strip().splitlines()
        return f"{name} {arch}: {lines[-1][:160] if lines else type(error).__name__}"
    if loop is None:
        return f"{name} {arch}: no loop with matrix instructions"
    return counted(
        name,
        arch,
        loop,
        registers,
        spilled,
        int(result.metadata.shared),
        int(result.metadata.num_warps),
    )


def counted(
    name: str, arch: str, loop: Loop, registers: int, spilled: int, shared: int, warps: int
) -> Bound:
    """shared: bytes that one block takes of an SM's."""
    card = CARDS[arch]
    cycles = loop.cycles(card, warps)
    by_registers = card.registers // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = card.shared_kb * 1024 // (shared + 1024)  # a block takes 1 KB more for itself
    ideal = cycles["tensor"] / max(cycles.values())
    serial = cycles["tensor"] / (
        cycles["tensor"]
        + max(value for pipe, value in cycles.items() if pipe not in ("tensor", "lsu"))
    )
    peak = 2 * sum(loop.work.values()) * warps / cycles["tensor"] * card.sms * card.ghz / 1e3
    return Bound(
        name,
        arch,
        registers,
        spilled,
        round(shared / 1024, 1),
        min(by_registers, by_shared),
        warps,
        round(ideal, 4),
        round(serial, 4),
        max(PIPES, key=cycles.__getitem__),
        round(peak * ideal),
        round(peak * serial),
        **{f"cycles_{pipe}": round(cycles[pipe], 1) for pipe in PIPES},
        unclassified=" ".join(loop.unclassified),
    )


def bounds(
    arches: Sequence[str],
    kernels: Sequence[str] = ("",),
    folder: Path | None = None,
    with_peers: bool = True,
) -> tuple[list[Bound], list[str]]:
    """(bounds of all kernels whose name contains one of `kernels`, what could not be counted)."""
    wanted = [
        (arch, name)
        for arch in arches
        for name in jobs(arch, folder, with_peers)
        if any(part in name for part in kernels)
    ]
    with ProcessPoolExecutor(
        max(1, min(8, os.cpu_count() or 1)), mp_context=get_context("spawn")
    ) as pool:
        count = partial(bound_of, folder=folder, with_peers=with_peers)
        found = list(pool.map(count, *zip(*wanted, strict=True))) if wanted else []
    return [one for one in found if isinstance(one, Bound)], [
        one for one in found if isinstance(one, str)
    ]


def read_table(path: Path = TABLE) -> list[Bound]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str}
    return [
        Bound(
            **{column.name: kinds[str(column.type)](row[column.name]) for column in fields(Bound)}
        )
        for row in rows
    ]


def write_table(found: Sequence[Bound], path: Path = TABLE) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [column.name for column in fields(Bound)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(asdict(one) for one in found)


def fallen(committed: Sequence[Bound], now: Sequence[Bound]) -> list[str]:
    """What the gate says: bounds of ours that are lower than the committed ones by more than
    `POINTS`, and those that are gone.
    """
    present, said = {one.key: one for one in now}, []
    for old in committed:
        new = present.get(old.key)
        if old.ours and new is None:
            said.append(f"{old.kernel} {old.arch}: not compiled any more")
        for name in ("ideal", "serial") if old.ours and new is not None else ():
            before, after = getattr(old, name), getattr(new, name)
            if after < before - POINTS:
                said.append(f"{old.kernel} {old.arch}: {name} bound {after:.1%}, was {before:.1%}")
    return said


def risen(committed: Sequence[Bound], now: Sequence[Bound]) -> list[str]:
    """Bounds that are higher, or new: `--write` makes them the ones that may not fall."""
    past = {one.key: one for one in committed}
    better = [
        one
        for one in now
        if one.key not in past
        or one.serial > past[one.key].serial + POINTS
        or one.ideal > past[one.key].ideal + POINTS
    ]
    return [
        f"{one.kernel} {one.arch}: ideal {one.ideal:.1%}, serial {one.serial:.1%}" for one in better
    ]


def factor(found: Sequence[Bound], arch: str) -> float | None:
    """What SageAttention 1 was published to reach of its own serial bound on the card of an
    architecture.
    """
    sage = next((one for one in found if one.key == (SAGE, arch)), None)
    return PUBLISHED[sage.key] / sage.tops if sage else None


def predicted(one: Bound, found: Sequence[Bound]) -> float | None:
    """TOPS of attention: its serial bound times `factor`. None for products: nothing published
    calibrates them.
    """
    scale = factor(found, one.arch)
    return (
        one.tops * scale
        if scale and "attention" in one.kernel and one.key not in PUBLISHED
        else None
    )


# Of a block's linears, how many multiplications (in 5120^2 per token) are stored as they are and
# how many are added to the stream.
LINEAR_WORK = {"store": 3 + 1 + 13824 / 5120, "+= gate * y": 1 + 1 + 13824 / 5120}
# Nothing published calibrates products: they are predicted at the lowest share of a serial bound
# that anything published reaches.
LOWEST_PUBLISHED = 0.73


def shares(found: Sequence[Bound], arch: str) -> dict[str, float]:
    """What is predicted of the card's dense peaks, for `lowvram.timing.cards`: linears in int8 and
    fp8, and attention of the int8 peak.
    """
    card, by_kernel = CARDS[arch], {one.kernel: one for one in found if one.arch == arch}
    predictions = {}
    for kind in ("int8", "fp8"):
        rates = {
            label: by_kernel[f"linear {kind} {label}"].tops
            for label in LINEAR_WORK
            if f"linear {kind} {label}" in by_kernel
        }
        if rates:
            mean = sum(LINEAR_WORK.values()) / sum(
                LINEAR_WORK[label] / rate for label, rate in rates.items()
            )
            predictions[f"gemm_{kind}"] = LOWEST_PUBLISHED * mean / card.tops(kind)
    attention = predicted(by_kernel[f"attention {default_values(arch)}"], found)
    if attention is not None:
        predictions["attention"] = attention / card.tops("int8")
    return {name: round(share, 3) for name, share in predictions.items()}


def table(
    found: Sequence[Bound], measured: dict[tuple[str, str], float], pipes: bool = False
) -> str:
    heads = [
        "kernel",
        "card",
        "registers",
        "spilled",
        "shared KB",
        "blocks x warps",
        "ideal",
        "serial",
        "limit",
        "TOPS serial",
        "predicted",
        "measured",
    ]
    heads += [f"{pipe} cycles" for pipe in PIPES] if pipes else []
    lines = [
        f"| {' | '.join(heads)} |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|" + "--:|" * (len(PIPES) if pipes else 0),
    ]
    for one in found:
        published, guess = PUBLISHED.get(one.key), predicted(one, found)
        cells = [
            one.kernel,
            f"{CARDS[one.arch].name} {one.arch}",
            one.registers,
            one.spilled_bytes,
            f"{one.shared_kb:g}",
        ]
        cells += [
            f"{one.blocks} x {one.warps}",
            f"{one.ideal:.0%}",
            f"{one.serial:.0%}",
            one.limit,
            f"{one.tops:.0f}",
        ]
        cells += [
            f"{guess:.0f}" if guess else "-",
            f"{published} (published)" if published else shown(measured.get(one.key)),
        ]
        cells += [f"{getattr(one, f'cycles_{pipe}'):.0f}" for pipe in PIPES] if pipes else []
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def shown(rate: float | None) -> str:
    return "not measured" if rate is None else f"{rate:.0f}"


def measured_rates(folder: Path = BENCHMARKS) -> dict[tuple[str, str], float]:
    """TOPS of our kernels at 32,760 tokens out of committed rows of `bench all` (rows-*.jsonl),
    by kernel and architecture.
    """
    calls = {
        "attention 32760 queries, 32760 keys, 40 heads, lowvram int8, PV ": "attention ",
        "linear q M=32760 N=5120 K=5120, lowvram ": "linear {} store",
    }
    calls |= {"linear ffn.2 += M=32760 N=5120 K=13824, lowvram ": "linear {} += gate * y"}
    found: dict[tuple[str, str], float] = {}
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            arch = next(
                (arch for arch, card in CARDS.items() if card.name in row.get("gpu", "")), None
            )
            start = next((start for start in calls if row["unit"].startswith(start)), None)
            if row["event"] == "row" and arch and start:
                kind = row["unit"].removeprefix(start)
                kernel = calls[start].format(kind) if "{}" in calls[start] else calls[start] + kind
                found[kernel, arch] = row["rate"]
    return found


def calibration(found: Sequence[Bound]) -> str:
    lines = ["| published | card | TOPS | of ideal | of serial |", "|---|---|--:|--:|--:|"]
    for one in found:
        if one.key in PUBLISHED:
            rate = PUBLISHED[one.key]
            lines.append(
                f"| {one.kernel} | {CARDS[one.arch].name} | {rate} | {rate / one.tops_ideal:.2f} "
                f"| {rate / one.tops:.2f} |"
            )
    return "\n".join(lines)


def section(found: Sequence[Bound]) -> str:
    """What stands between the marks in docs/benchmarks/kernels.md."""
    return f"{BEGIN}\n\n{table(found, measured_rates())}\n\n{calibration(found)}\n\n{END}"


def write_document(found: Sequence[Bound], path: Path = DOCUMENT) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(
        re.sub(f"{BEGIN}.*{END}", lambda _: section(found), text, flags=re.DOTALL), encoding="utf-8"
    )


def missing() -> str:
    """What the machine lacks, in one line; empty where nothing."""
    lacking = [name for name in ("torch", "triton") if find_spec(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    spec = find_spec("triton")
    tools = Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin" if spec else Path()
    absent = [
        name
        for name in ("nvdisasm", "cuobjdump")
        if not (tools / name).exists() and not (tools / f"{name}.exe").exists()
    ]
    return (
        f"this Triton comes without {', '.join(absent)}: install triton from PyPI" if absent else ""
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    lacking = missing()
    if lacking:
        print(f"static_bound: {lacking}", file=sys.stderr)
        return 1
    if os.environ.pop("TRITON_INTERPRET", None):
        print("static_bound: TRITON_INTERPRET is ignored, kernels are compiled", file=sys.stderr)
    try:
        found, failed = bounds(
            options.arch, options.kernel, options.peers, with_peers=not options.check
        )
    except (UnknownInstructionError, subprocess.CalledProcessError, OSError, ImportError) as error:
        print(f"static_bound: {error}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"static_bound: not counted: {line}", file=sys.stderr)
    for one in found:
        if one.unclassified:
            print(
                f"static_bound: {one.kernel} {one.arch}: opcodes without a pipe: "
                f"{one.unclassified}",
                file=sys.stderr,
            )
    if options.check:
        return gate(
            found,
            [
                one
                for one in read_table()
                if one.arch in options.arch and any(part in one.kernel for part in options.kernel)
            ],
            failed,
        )
    print(table(found, measured_rates(), options.pipes))
    if options.calibrate:
        print(f"\n{calibration(found)}")
    if options.write:
        committed = read_table() if TABLE.exists() else []
        kept = [
            one for one in committed if one.key not in {new.key for new in found} and not one.ours
        ]
        everything = sorted([*found, *kept], key=lambda one: (ARCHES.index(one.arch), order(one)))
        write_table(everything)
        write_document(everything)
    return 1 if failed or not found else 0


def order(one: Bound) -> tuple[int, str]:
    """Ours first, as `OURS` has them."""
    return (OURS.index(one.kernel), "") if one.ours else (len(OURS), one.kernel)


def gate(found: Sequence[Bound], committed: Sequence[Bound], failed: Sequence[str]) -> int:
    lower, higher = fallen(committed, found), risen(committed, found)
    for line in lower:
        print(f"static_bound: fallen: {line}", file=sys.stderr)
    for line in higher:
        print(f"risen: {line} (--write keeps it)")
    print(
        f"{len(found)} bounds of {len(committed)} committed, {len(lower)} fallen, "
        f"{len(higher)} risen"
    )
    return 1 if lower or failed or not found else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHES), choices=ARCHES)
    parser.add_argument(
        "--kernel", nargs="+", default=[""], help="only kernels whose name contains one of these"
    )
    parser.add_argument(
        "--peers", type=Path, help="folder of unpacked wheels, beside what is installed"
    )
    parser.add_argument("--pipes", action="store_true", help="also the cycles of every pipe")
    parser.add_argument(
        "--calibrate", action="store_true", help="also what was published against the bounds"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--write",
        action="store_true",
        help="write the table into docs/benchmarks; peers that are absent stay as they are",
    )
    mode.add_argument(
        "--check", action="store_true", help="compare our kernels with docs/benchmarks/static.csv"
    )
    options = parser.parse_args(arguments)
    if options.write and (options.arch != list(ARCHES) or options.kernel != [""]):
        parser.error("--write takes all architectures and kernels")
    return options


if __name__ == "__main__":
    sys.exit(main())
