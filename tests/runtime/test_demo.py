"""The demo: one command, a clip that shows its caption, and a checker that would notice another one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from lowvram.cli import app
from lowvram.demo import scenes
from lowvram.demo.checker import matches

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import judge_demo

RECORD = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "demo.json"


def test_the_demo_command_writes_a_clip_that_shows_the_prompt(tmp_path: Path) -> None:
    out = tmp_path / "demo.mp4"
    result = CliRunner().invoke(app, ["demo", "--out", str(out)])
    assert result.exit_code == 0, result.output
    with av.open(str(out)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    small = frames[:, 2::4, 2::4]  # saved at four times its size
    assert small.shape == (scenes.NUM_FRAMES, scenes.SIZE, scenes.SIZE, 3)
    assert matches(small, scenes.Scene((("red", "circle"),), "white", "right"))


@pytest.mark.slow
def test_held_out_captions_come_out_right_and_shuffled_ones_do_not() -> None:
    """A part of the recorded judgement, repeated here; another processor's rounding may tip one clip that is on the edge."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    (recorded,) = (score for score in record["scores"] if score["format"] == "int8")
    pairs = judge_demo.pairs_of(record["split"], recorded["pairs"], record["figures"])[:15]
    score = judge_demo.judge("int8", pairs, [])
    known_wrong = {scene.caption() for scene, _ in pairs} & set(recorded["wrong"])
    assert score.right >= len(pairs) - len(known_wrong) - 1, score.wrong
    assert score.shuffled_right <= 2


def test_the_record_is_of_held_out_captions_and_quantization_costs_nothing() -> None:
    """The goal of 90 % in bf16 is not reached (README says what is); int8 and fp8 lose at most 2 points against bf16."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    scores = {score["format"]: score for score in record["scores"]}
    assert record["split"] == "test"
    assert set(scores) == {"bf16", "int8", "fp8"}
    assert all(score["pairs"] == 50 for score in scores.values())
    assert all(scores["bf16"]["right"] - score["right"] <= 1 for score in scores.values())
    assert all(score["right"] >= 40 and score["shuffled_right"] <= 2 for score in scores.values())
