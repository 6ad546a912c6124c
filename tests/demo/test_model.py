"""The shipped demo model: its size, its layout, its tokenizer, and widths that every format
takes.
"""

from __future__ import annotations

from pathlib import Path

from lowvram import demo
from lowvram.checkpoint.source import open_source
from lowvram.demo import scenes
from lowvram.prompt.tokenizer import Tokenizer
from lowvram.request import DEFAULT_NEGATIVE_PROMPT

MODEL = Path(demo.__file__).parent / "model"


def test_is_at_most_20_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 20_000_000


def test_is_a_checkpoint_in_the_official_layout() -> None:
    with open_source(MODEL) as source:
        assert source.layout == "official"
        dit, defaults = source.config.dit, source.config.sampling
        assert (defaults.width, defaults.height) == (scenes.SIZE, scenes.SIZE)
        assert (defaults.num_frames, defaults.fps) == (scenes.NUM_FRAMES, scenes.FPS)
        assert defaults.boundary == 0.875
        assert dit.dim % 256 == dit.ffn_dim % 256 == dit.text_dim % 256 == 0
        assert (
            source.config.text_encoder.d_model % 256 == source.config.text_encoder.d_ff % 256 == 0
        )


def test_tokenizer_knows_every_caption_and_keeps_other_text_short() -> None:
    tokenizer = Tokenizer((MODEL / "google/umt5-xxl/tokenizer.json").read_bytes())
    unknown = 3
    for color in scenes.COLORS:
        for motion in scenes.MOTIONS:
            caption = scenes.Scene(
                ((color, "circle"), ("white", "square")), "gray", motion
            ).caption()
            ids = tokenizer.encode(caption, 32)
            assert unknown not in ids
            assert len(ids) == len(caption.split()) + 1
    assert tokenizer.encode("", 32) == [1]
    assert len(tokenizer.encode(DEFAULT_NEGATIVE_PROMPT, 32)) < 10
