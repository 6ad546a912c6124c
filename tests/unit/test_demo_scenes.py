"""The drawn clips: captions say what is drawn, figures stay inside and do not touch."""

from __future__ import annotations

import random

import torch

from lowvram.demo import scenes
from lowvram.demo.scenes import Scene


def test_caption_agrees_in_number() -> None:
    one = Scene((("red", "circle"),), "gray", "left")
    two = Scene((("red", "circle"), ("green", "square")), "black", "grow")
    assert one.caption() == "a red circle moves left on a gray background"
    assert two.caption() == "a red circle and a green square grow on a black background"


def test_figures_differ_in_color_from_the_ground_and_from_each_other() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = scenes.random_scene(rng, two_figures=0.5)
        colors = [color for color, _ in scene.figures]
        assert len({*colors, scene.ground}) == len(colors) + 1


def test_render_is_reproducible_and_in_range() -> None:
    scene = scenes.random_scene(random.Random(3), two_figures=0.5)
    first, second = (scenes.render(scene) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, scenes.NUM_FRAMES, scenes.SIZE, scenes.SIZE)
    assert -1 <= first.min() < first.max() <= 1


def test_two_figures_never_overlap() -> None:
    for motion in scenes.MOTIONS:
        scene = Scene((("red", "square"), ("green", "circle")), "black", motion)
        clip = (scenes.render(scene) + 1) / 2
        red, green = (clip[0] > 0.5), (clip[1] > 0.35) & (clip[0] < 0.4)
        for frame in range(scenes.NUM_FRAMES):
            rows = [set(mask[frame].any(1).nonzero().flatten().tolist()) for mask in (red, green)]
            columns = [set(mask[frame].any(0).nonzero().flatten().tolist()) for mask in (red, green)]
            assert not rows[0] & rows[1] or not columns[0] & columns[1]


def test_collage_is_reproducible() -> None:
    first, second = (scenes.render_collage(torch.Generator().manual_seed(1), 2, 5, 32) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 3, 5, 32, 32)
