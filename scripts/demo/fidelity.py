"""Measures how far the demo model's clips of each format are from those of fp32, in PSNR.

    python -m scripts.demo.fidelity        # 24 validation and 16 held-out clips of four formats
    python -m scripts.demo.fidelity --formats int8 --clips 4 --held-out 0
    python -m scripts.demo.fidelity --json docs/benchmarks/fidelity.json
    python -m scripts.demo.fidelity --formats int8 --clips 8 --held-out 0 --text-values int8

PSNR is that of all frames of a clip, 8 bits a channel, against the same prompt and seed in fp32. A
clip's PSNR varies by some dB from one rounding of the noise to the next, so means are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from lowvram_kernels.sizes import STORED_VALUES, TEXT_VALUES
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
class Fidelity:
    """PSNR in dB of each clip of a format against fp32, and their means."""

    format: str
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


def clips(format: str, pairs: Iterable[Pair], model: Path = MODEL) -> list[Tensor]:
    """Frames of each pair of scene and seed, with the model quantized to `format`."""
    with tempfile.TemporaryDirectory() as folder:
        quantize(model, Path(folder) / "model", format)
        pipeline = load(Path(folder) / "model", device="cpu")
        with pipeline.store:
            return [
                pipeline(scene.caption(), seed=seed).frames
                for scene, seed in track(
                    list(pairs), description=format, console=Console(stderr=True)
                )
            ]


def spread(split: str, count: int, captions: int) -> list[Pair]:
    """`count` pairs of a scene and a seed: `captions` scenes of one figure, spread over all of
    `split`, each with several seeds.
    """
    scenes_ = [
        scene
        for scene in scenes.all_scenes()
        if len(scene.figures) == 1 and scenes.split(scene) == split
    ]
    chosen = [scenes_[number * len(scenes_) // captions] for number in range(captions)]
    return [(chosen[seed % captions], seed) for seed in range(count)]


def clip_pairs(num_clips: int, num_held_out: int) -> list[Pair]:
    """The validation clips, each of another caption, then the held-out ones."""
    return [
        *spread("validation", num_clips, num_clips),
        *spread("test", num_held_out, -(-num_held_out // SEEDS)),
    ]


def measured(
    formats: Sequence[str], num_clips: int, num_held_out: int, model: Path = MODEL
) -> list[Fidelity]:
    """The fidelity of each format, over as many validation and held-out clips."""
    pairs = clip_pairs(num_clips, num_held_out)
    exact = clips("fp32", pairs, model)
    found = []
    for format in formats:
        began = time.monotonic()
        values = [
            round(psnr(clip, other), 2)
            for clip, other in zip(clips(format, pairs, model), exact, strict=True)
        ]
        seconds = round((time.monotonic() - began) / max(1, len(pairs)), 2)
        found.append(
            Fidelity(format, tuple(values[:num_clips]), tuple(values[num_clips:]), seconds)
        )
    return found


def table(found: Sequence[Fidelity]) -> Table:
    """The means as a table for the terminal."""
    shown = Table(title="PSNR against fp32, mean of clips, dB")
    for name in ("format", "validation", "held-out", "seconds per clip"):
        shown.add_column(name)
    for one in found:
        means = one.means()
        shown.add_row(
            one.format,
            *(str(value) if value is not None else "-" for value in means.values()),
            str(one.seconds_per_clip),
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int8-plain", "fp8"])
    parser.add_argument("--clips", type=int, default=24, help="validation clips")
    parser.add_argument("--held-out", type=int, default=16, help="clips of test captions")
    parser.add_argument(
        "--text-values",
        choices=sorted(STORED_VALUES),
        default=TEXT_VALUES,
        help="how quantized formats store the text's values in attention",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with (
        mock.patch.object(numerics, "TEXT_VALUES", args.text_values),
        mock.patch.object(workspace, "TEXT_VALUES", args.text_values),
    ):
        found = measured(args.formats, args.clips, args.held_out)
    Console().print(table(found))
    if args.json:
        record = {
            "machine": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "processor": platform.machine(),
            },
            "model_sha256": fingerprint(MODEL),
            "formats": [asdict(one) | {"mean": one.means()} for one in found],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
