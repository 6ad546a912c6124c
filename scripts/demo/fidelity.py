"""Measures how far the demo model's clips of each format are from those of fp32, in PSNR.

    python -m scripts.demo.fidelity        # 24 validation and 16 held-out clips of every case
    python -m scripts.demo.fidelity --cases int8 "int8, 2 refined steps" --clips 4 --held-out 0
    python -m scripts.demo.fidelity --json docs/benchmarks/fidelity.json

A case is a format, or int8 with one rounding changed. PSNR is that of all frames of a clip, 8 bits
a channel, against the same prompt and seed in fp32. A clip's PSNR varies by some dB from one
rounding of the noise to the next, so means are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from lowvram_kernels.sizes import EXACT_VALUES
from lowvram_quantize.convert import quantize
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lowvram.demo import scenes
from lowvram.demo.run import MODEL
from lowvram.models import numerics
from lowvram.pipeline import load
from lowvram.planner import workspace
from scripts.demo.judge import fingerprint

PEAK = 255.0
# Held-out captions are shown with as many seeds each.
SEEDS = 2

Pair = tuple[scenes.Scene, int]


@dataclass(frozen=True)
class Case:
    """A format, or one with a change. environment: of the run; exact_values: in place of
    `sizes.EXACT_VALUES`.
    """

    format: str
    refine_steps: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    exact_values: str = EXACT_VALUES


CASES = {
    "bf16": Case("bf16"),
    "int8": Case("int8"),
    "int8, 1 refined step": Case("int8", 1),
    "int8, 2 refined steps": Case("int8", 2),
    "int8, 4 refined steps": Case("int8", 4),
    "int8, all steps refined": Case("int8", 16),
    "int8, values of the text in int8": Case("int8", exact_values="int8"),
    "int8, own values in fp16": Case("int8", environment={"LOWVRAM_PV": "fp16"}),
    "int8, activations in bf16": Case("int8", environment={"LOWVRAM_ACTIVATIONS": "bf16"}),
    "int8-plain": Case("int8-plain"),
    "fp8": Case("fp8"),
}


@dataclass(frozen=True)
class Fidelity:
    """PSNR in dB of each clip of a case against fp32, and their means."""

    case: str
    validation: tuple[float, ...]
    held_out: tuple[float, ...]
    seconds_per_clip: float

    def means(self) -> dict[str, float | None]:
        """The mean of each split in dB, None without clips."""
        return {
            name: round(mean(clips), 2) if clips else None
            for name, clips in (("validation", self.validation), ("held_out", self.held_out))
        }


def psnr(actual: Tensor, expected: Tensor) -> float:
    """PSNR in dB of uint8 frames; 100 for equal ones."""
    error = float((actual.double() - expected.double()).square().mean())
    return 100.0 if error == 0 else float(10 * torch.log10(torch.tensor(PEAK**2 / error)))


def clips(label: str, case: Case, pairs: Iterable[Pair], model: Path = MODEL) -> list[Tensor]:
    """Frames of each pair of scene and seed, as `case` computes them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, case.environment),
        mock.patch.object(numerics, "EXACT_VALUES", case.exact_values),
        mock.patch.object(workspace, "EXACT_VALUES", case.exact_values),
    ):
        quantize(model, Path(folder) / "model", case.format)
        pipeline = load(Path(folder) / "model", device="cpu")
        with pipeline.store:
            return [
                pipeline(scene.caption(), seed=seed, refine_steps=case.refine_steps).frames
                for scene, seed in track(
                    list(pairs), description=label, console=Console(stderr=True)
                )
            ]


def spread(split: str, count: int, captions: int) -> list[Pair]:
    """`count` pairs of a scene and a seed: `captions` scenes of one figure, spread over all of
    `split`, each with several seeds.
    """
    found = [
        scene
        for scene in scenes.all_scenes()
        if len(scene.figures) == 1 and scenes.split(scene) == split
    ]
    chosen = [found[number * len(found) // captions] for number in range(captions)]
    return [(chosen[seed % captions], seed) for seed in range(count)]


def clip_pairs(num_clips: int, num_held_out: int) -> list[Pair]:
    """The validation clips, each of another caption, then the held-out ones."""
    return [
        *spread("validation", num_clips, num_clips),
        *spread("test", num_held_out, -(-num_held_out // SEEDS)),
    ]


def measured(
    cases: Sequence[str], num_clips: int, num_held_out: int, model: Path = MODEL
) -> Iterator[Fidelity]:
    """The fidelity of each case of `CASES`, over as many validation and held-out clips."""
    pairs = clip_pairs(num_clips, num_held_out)
    exact = clips("fp32", Case("fp32"), pairs, model)
    for case in cases:
        began = time.monotonic()
        values = [
            round(psnr(clip, other), 2)
            for clip, other in zip(clips(case, CASES[case], pairs, model), exact, strict=True)
        ]
        seconds = round((time.monotonic() - began) / max(1, len(pairs)), 2)
        yield Fidelity(case, tuple(values[:num_clips]), tuple(values[num_clips:]), seconds)


def table(found: Sequence[Fidelity]) -> Table:
    """The means as a table for the terminal."""
    shown = Table(title="PSNR against fp32, mean of clips, dB")
    for name in ("case", "validation", "held-out", "seconds per clip"):
        shown.add_column(name)
    for one in found:
        means = one.means()
        shown.add_row(
            one.case,
            *(str(value) if value is not None else "-" for value in means.values()),
            str(one.seconds_per_clip),
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--clips", type=int, default=24, help="validation clips")
    parser.add_argument("--held-out", type=int, default=16, help="clips of test captions")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: list[Fidelity] = []
    for one in measured(args.cases, args.clips, args.held_out):
        found.append(one)
        if args.json:
            write(args.json, found)
    Console().print(table(found))


def write(path: Path, found: Sequence[Fidelity]) -> None:
    """Write what was measured so far as JSON."""
    record = {
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": platform.machine(),
        },
        "model_sha256": fingerprint(MODEL),
        "cases": [asdict(one) | {"mean": one.means()} for one in found],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
