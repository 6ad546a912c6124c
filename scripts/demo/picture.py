"""An animated picture of demo clips side by side, as in the README.

python -m scripts.demo.picture docs/images/demo.gif
    python -m scripts.demo.picture sheet.gif --clip 3 "a red circle grows on a white background"
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import lowvram

# (seed, prompt) of the clips in the README.
CLIPS = (
    (3, "a red circle moves right on a white background"),
    (1, "a yellow triangle bounces on a black background"),
    (4, "a blue square moves down on a white background"),
    (2, "a green circle grows on a gray background"),
)
MODEL = Path(lowvram.__file__).parent / "demo" / "model"
SCALE = 3
GAP = 6
FRAME_MS = 120
LAST_FRAME_MS = 900


def frames_of(
    clips: Sequence[tuple[int, str]], model: Path = MODEL, format: str = "int8"
) -> list[np.ndarray]:
    """Frames [H, W, 3] uint8 of all clips side by side, quantized and generated here."""
    with tempfile.TemporaryDirectory() as folder:
        lowvram.quantize(model, Path(folder) / "model", format=format)
        pipe = lowvram.load(Path(folder) / "model")
        videos = [pipe(prompt=prompt, seed=seed).frames.numpy() for seed, prompt in clips]
    enlarged = [video.repeat(SCALE, axis=1).repeat(SCALE, axis=2) for video in videos]
    frames, height = enlarged[0].shape[:2]
    gap = np.full((frames, height, GAP, 3), 255, dtype=np.uint8)
    row: list[np.ndarray] = []
    for video in enlarged:
        row += [gap, video] if row else [video]
    return list(np.concatenate(row, axis=2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the .gif to write")
    parser.add_argument(
        "--clip",
        nargs=2,
        action="append",
        metavar=("SEED", "PROMPT"),
        help="a clip instead of those of the README; may be given several times",
    )
    options = parser.parse_args(arguments)
    clips = [(int(seed), prompt) for seed, prompt in options.clip or CLIPS]
    first, *rest = (Image.fromarray(frame) for frame in frames_of(clips))
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    first.save(options.out, save_all=True, append_images=rest, duration=durations, loop=0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
