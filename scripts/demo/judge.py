"""Scores the demo model on held-out captions, format by format, with a checker that sees only the
decoded frames.

    python -m scripts.demo.judge                                   # 50 pairs of prompt and seed in bf16, int8 and fp8
    python -m scripts.demo.judge --pairs 12 --formats int8 --sheet sheet.png

Prints a table, also for shuffled captions (which must fail), and writes JSON with `--json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from lowvram_quantize.convert import quantize
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowvram.demo import scenes
from lowvram.demo.checker import Match, matches
from lowvram.demo.run import MODEL
from lowvram.pipeline import load


@dataclass
class Score:
    """How many of the clips show what their caption says, in all and by attribute; `shuffled`:
    against another clip's caption.
    """

    format: str
    pairs: int
    right: int = 0
    shuffled_right: int = 0
    ground: int = 0
    colors: int = 0
    shapes: int = 0
    motion: int = 0
    seconds_per_clip: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, scene: scenes.Scene, match: Match) -> None:
        for name in ("ground", "colors", "shapes", "motion"):
            setattr(self, name, getattr(self, name) + bool(getattr(match, name)))
        self.right += bool(match)
        if not match:
            self.wrong.append(scene.caption())


def pairs_of(
    split: str, count: int, figures: int = 1, seed: int = 2026
) -> list[tuple[scenes.Scene, int]]:
    """`count` (scene, seed) pairs: the scenes of `split` with that many figures, shuffled and
    repeated, each time with another seed.
    """
    chosen = [
        scene
        for scene in scenes.all_scenes()
        if scenes.split(scene) == split and len(scene.figures) == figures
    ]
    random.Random(seed).shuffle(chosen)
    return [(chosen[number % len(chosen)], number) for number in range(count)]


def judge(
    format: str,
    pairs: list[tuple[scenes.Scene, int]],
    strip: list[torch.Tensor],
    model: Path = MODEL,
) -> Score:
    """Quantizes the model to `format` and generates every pair; the frames of the clips are added
    to `strip`.
    """
    score = Score(format, len(pairs))
    with tempfile.TemporaryDirectory() as folder:
        quantize(model, Path(folder) / "model", format)
        pipeline = load(Path(folder) / "model", device="cpu")
        began, clips = time.monotonic(), []
        for scene, seed in track(pairs, description=format, console=Console(stderr=True)):
            clips.append(pipeline(scene.caption(), seed=seed).frames)
            score.add(scene, matches(clips[-1], scene))
        score.seconds_per_clip = round((time.monotonic() - began) / len(pairs), 2)
        pipeline.store.close()
    shifted = [scene for scene, _ in pairs[1:] + pairs[:1]]
    score.shuffled_right = sum(
        bool(matches(frames, scene)) for frames, scene in zip(clips, shifted, strict=True)
    )
    strip += clips
    return score


def fingerprint(model: Path) -> str:
    """sha256 over the names and bytes of the model's files: which weights a score is of."""
    digest = hashlib.sha256()
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        digest.update(
            f"{path.relative_to(model).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def save_sheet(path: Path, clips: list[torch.Tensor], columns: int = 8) -> None:
    """One row per clip, its frames evenly spaced."""
    rows = [
        np.concatenate(
            [clip[i] for i in np.linspace(0, len(clip) - 1, columns).round().astype(int)], axis=1
        )
        for clip in clips
    ]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def table(scores: list[Score], split: str) -> Table:
    shown = Table(title=f"{split} captions shown right")
    for name in (
        "format",
        "right",
        "ground",
        "colours",
        "shapes",
        "motion",
        "shuffled captions",
        "seconds per clip",
    ):
        shown.add_column(name)
    for score in scores:
        counts = (
            score.right,
            score.ground,
            score.colors,
            score.shapes,
            score.motion,
            score.shuffled_right,
        )
        shown.add_row(
            score.format,
            *(f"{count}/{score.pairs}" for count in counts),
            str(score.seconds_per_clip),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--formats", default="bf16,int8,fp8")
    parser.add_argument(
        "--split",
        default="test",
        choices=("test", "validation", "train"),
        help="settings are chosen on validation",
    )
    parser.add_argument(
        "--figures",
        type=int,
        default=1,
        choices=(1, 2),
        help="in every scene; the shipped model is trained for one",
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="checkpoint folder; the shipped one by default"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="a PNG of every clip's frames")
    args = parser.parse_args()
    torch.set_num_threads(1)
    strip: list[torch.Tensor] = []
    scores = [
        judge(format, pairs_of(args.split, args.pairs, args.figures), strip, args.model)
        for format in args.formats.split(",")
    ]
    Console().print(table(scores, args.split))
    if args.sheet:
        save_sheet(args.sheet, strip)
    if args.json:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": platform.machine(),
        }
        record = {
            "machine": machine,
            "model_sha256": fingerprint(args.model),
            "split": args.split,
            "figures": args.figures,
        }
        args.json.write_text(
            json.dumps(record | {"scores": [asdict(score) for score in scores]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
