"""`lowvram demo`: quantize the small model of the package and generate one clip with it."""

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
# The 64x64 clip is saved at 256x256, a more visible size.
SCALE = 4


@dataclass(frozen=True)
class DemoResult:
    """The clip, the seconds that each stage took, and the scale for saving the clip."""

    video: Video
    quantize_s: float
    generate_s: float
    scale: int = SCALE


def is_own_clip(path: Path) -> bool:
    """Whether `path` is a video made by lowvram, according to its metadata.

    Only such a file is overwritten without `--overwrite`.
    """
    try:
        return path.is_file() and read_metadata(path).get("generator") == "lowvram"
    except (UsageError, RecursionError):  # the file's comment may be any JSON
        return False


def run_demo(
    prompt: str, seed: int = 0, format: str = "int8", listener: Listener = silent
) -> DemoResult:
    """Quantize the demo model into a temporary folder and generate one clip.

    Raises `LowvramError`.
    """
    with tempfile.TemporaryDirectory(prefix="lowvram-demo-") as folder:
        began = time.monotonic()
        quantize(MODEL, Path(folder) / "model", format)
        quantized = time.monotonic()
        pipeline = load(Path(folder) / "model")
        with pipeline.store:
            video = pipeline.generate(pipeline.request(prompt, seed=seed), listener=listener)
        return DemoResult(video, quantized - began, time.monotonic() - quantized)
