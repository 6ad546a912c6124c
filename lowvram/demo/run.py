"""`lowvram demo`: quantizes the small model that ships with the package and generates one clip with
it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lowvram_quantize.convert import quantize

from lowvram.errors import UsageError
from lowvram.pipeline import Video, load
from lowvram.progress import Listener, silent
from lowvram.video import read_metadata

MODEL = Path(__file__).parent / "model"
# A 64x64 clip is saved at 256x256, so that a player shows something.
SCALE = 4


@dataclass(frozen=True)
class DemoResult:
    """The clip and what it took, in seconds."""

    video: Video
    quantize_s: float
    generate_s: float
    scale: int = SCALE


def is_own_clip(path: Path) -> bool:
    """Whether there is a video at `path` whose metadata says that lowvram made it: only such a file
    is replaced unasked.
    """
    try:
        return path.is_file() and read_metadata(path).get("generator") == "lowvram"
    except (UsageError, RecursionError):  # a comment in it may be any JSON
        return False


def run_demo(
    prompt: str, seed: int = 0, format: str = "int8", listener: Listener = silent
) -> DemoResult:
    """The whole path in a temporary folder: checkpoint -> store -> frames."""
    with tempfile.TemporaryDirectory(prefix="lowvram-demo-") as folder:
        began = time.monotonic()
        quantize(MODEL, Path(folder) / "model", format)
        quantized = time.monotonic()
        pipeline = load(Path(folder) / "model")
        with pipeline.store:
            video = pipeline.generate(pipeline.request(prompt, seed=seed), listener=listener)
        return DemoResult(video, quantized - began, time.monotonic() - quantized)
