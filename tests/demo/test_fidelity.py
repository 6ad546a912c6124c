"""`scripts/demo/fidelity.py`: PSNR of clips against fp32."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import torch

from lowvram.demo import scenes
from lowvram.demo.run import MODEL
from scripts.demo import fidelity
from scripts.demo.judge import fingerprint

RECORD = Path(__file__).parents[2] / "docs" / "benchmarks" / "fidelity.json"


def test_psnr_of_frames() -> None:
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert fidelity.psnr(black, black) == 100
    assert fidelity.psnr(black + 255, black) == pytest.approx(0, abs=1e-6)
    assert fidelity.psnr(black + 1, black) == pytest.approx(48.13, abs=0.01)


def test_clips_are_spread_over_the_captions_of_their_split() -> None:
    pairs = fidelity.clip_pairs(24, 16)
    captions = [scene.caption() for scene, _ in pairs]
    assert len(pairs) == len(set(pairs)) == 40
    assert len(set(captions[:24])) == 20  # all there are
    assert len(set(captions[24:])) == 8
    assert not set(captions[:24]) & set(captions[24:])
    assert {scenes.split(scene) for scene, _ in pairs[24:]} == {"test"}


def test_int8_is_close_to_fp32_and_refined_steps_are_closer() -> None:
    torch.set_num_threads(1)
    names = ("bf16", "int8", "int8, 4 refined steps")
    # one clip differs by more than a decibel from one processor to another
    _, int8, refined = fidelity.measured(names, 3, 0)
    assert all(45 < decibels < 70 for decibels in int8.validation)
    assert mean(refined.validation) > mean(int8.validation) + 0.5
    assert int8.means()["held_out"] is None


def test_the_record_is_of_these_weights_and_names_what_was_measured() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["model_sha256"] == fingerprint(MODEL)
    formats = {one["case"]: one for one in record["cases"]}
    assert {"bf16", "int8", "int8, 2 refined steps", "fp8"} <= set(formats) <= set(fidelity.CASES)
    assert {len(one["validation"]) for one in formats.values()} == {24}
    assert {len(one["held_out"]) for one in formats.values()} == {16}
    text = (RECORD.parent / "fidelity.md").read_text(encoding="utf-8")
    for name, one in formats.items():
        means = one["mean"]["validation"], one["mean"]["held_out"]
        assert f"| {name} | {means[0]:.2f} | {means[1]:.2f} |" in text, name
