"""The demo checker: right on drawn clips, wrong on other captions, and not fooled by what a caption
does not say.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lowvram.demo import scenes
from lowvram.demo.checker import UNKNOWN, describe, matches
from lowvram.demo.scenes import Scene


def drawn(scene: Scene, seed: int | None = None) -> np.ndarray:
    clip = scenes.render(scene, None if seed is None else torch.Generator().manual_seed(seed))
    return ((clip + 1) * 127.5).byte().permute(1, 2, 3, 0).numpy()


def blurred(frames: np.ndarray, noise: float = 6) -> np.ndarray:
    """What a small VAE does to a clip: soft edges and some noise."""
    shifted = [
        np.roll(frames.astype(np.float64), (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)
    ]
    soft: np.ndarray = np.sum(shifted, axis=0) / 9
    return (
        (soft + np.random.default_rng(0).normal(0, noise, soft.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("motion", scenes.MOTIONS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_describes_every_shape_and_motion(shape: str, motion: str) -> None:
    scene = Scene((("red", shape),), "gray", motion)
    assert describe(drawn(scene)) == scene
    assert matches(blurred(drawn(scene)), scene)


@pytest.mark.parametrize("ground", scenes.GROUNDS)
def test_describes_every_color_on_every_ground(ground: str) -> None:
    for color in scenes.COLORS:
        scene = Scene(((color, "square"),), ground, "left")
        assert describe(drawn(scene)) == scene


def test_two_figures_match_in_either_order() -> None:
    red, blue = ("red", "circle"), ("blue", "triangle")
    frames = drawn(Scene((red, blue), "white", "up"))
    assert matches(frames, Scene((blue, red), "white", "up"))
    assert not matches(
        frames, Scene((("blue", "circle"), ("red", "triangle")), "white", "up")
    ).shapes
    assert not matches(frames, Scene((red,), "white", "up")).colors


def test_other_captions_fail_by_the_attribute_that_differs() -> None:
    frames = drawn(Scene((("yellow", "circle"),), "black", "right"))
    verdicts = {
        "ground": matches(frames, Scene((("yellow", "circle"),), "gray", "right")),
        "colors": matches(frames, Scene((("green", "circle"),), "black", "right")),
        "shapes": matches(frames, Scene((("yellow", "square"),), "black", "right")),
        "motion": matches(frames, Scene((("yellow", "circle"),), "black", "left")),
    }
    for attribute, verdict in verdicts.items():
        assert not verdict
        assert not getattr(verdict, attribute)


def test_shuffled_captions_fail() -> None:
    chosen = random.Random(1).sample(scenes.all_scenes(), 60)
    clips = [drawn(scene, seed) for seed, scene in enumerate(chosen)]
    assert all(matches(clip, scene) for clip, scene in zip(clips, chosen, strict=True))
    assert not any(
        matches(clip, scene) for clip, scene in zip(clips, chosen[1:] + chosen[:1], strict=True)
    )


def test_stillness_emptiness_and_noise_are_unknown() -> None:
    scene = Scene((("red", "circle"),), "black", "left")
    still = np.repeat(drawn(scene)[:1], scenes.NUM_FRAMES, axis=0)
    assert describe(still) == Scene((("red", "circle"),), "black", UNKNOWN)
    empty = np.zeros((5, 64, 64, 3), np.uint8)
    assert describe(empty) == Scene((), "black", UNKNOWN)
    noise = torch.randint(
        0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert describe(noise).figures == ()


def test_refuses_frames_of_another_type() -> None:
    with pytest.raises(ValueError, match="uint8"):
        describe(np.zeros((5, 64, 64, 3), np.float32))


def test_captions_are_split_into_training_validation_and_test() -> None:
    known = scenes.all_scenes()
    assert len({scene.caption() for scene in known}) == len(known) == 216 + 1944
    for figures in (1, 2):
        splits = [scenes.split(scene) for scene in known if len(scene.figures) == figures]
        for name, least, most in (
            ("test", 0.08, 0.16),
            ("validation", 0.08, 0.16),
            ("train", 0.7, 0.84),
        ):
            assert least < splits.count(name) / len(splits) < most


def test_every_word_and_pair_of_colours_is_trained_on() -> None:
    """Held out are combinations, never a word or a colour on a ground."""
    trained = [
        scene
        for scene in scenes.all_scenes()
        if scenes.split(scene) == "train" and len(scene.figures) == 1
    ]
    pairs = {(scene.figures[0][0], scene.ground) for scene in trained}
    assert pairs == {(color, ground) for ground in scenes.GROUNDS for color in scenes.COLORS}
    assert {(scene.figures[0][1], scene.motion) for scene in trained} == {
        (a, b) for a in scenes.SHAPES for b in scenes.MOTIONS
    }
