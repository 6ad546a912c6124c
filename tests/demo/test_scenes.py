"""The drawn clips: captions say what is drawn, figures stay inside and do not touch."""

from __future__ import annotations

import random

import pytest
import torch

from lowvram.demo import scenes
from lowvram.demo.scenes import Scene


def test_caption_agrees_in_number() -> None:
    one = Scene((("red", "circle"),), "gray", "left")
    two = Scene((("red", "circle"), ("green", "square")), "black", "grow")
    assert one.caption() == "a red circle moves left on a gray background"
    assert two.caption() == "a red circle and a green square grow on a black background"


def test_a_bounce_agrees_in_number_too() -> None:
    assert (
        Scene((("blue", "square"),), "white", "bounce").caption()
        == "a blue square bounces on a white background"
    )


def test_figures_differ_in_color_from_the_ground_and_from_each_other() -> None:
    for scene in scenes.all_scenes():
        colors = [color for color, _ in scene.figures]
        assert len({*colors, scene.ground}) == len(colors) + 1


def test_render_is_reproducible_varied_and_in_range() -> None:
    scene = random.Random(3).choice(scenes.all_scenes())
    first, second, other = (
        scenes.render(scene, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (3, scenes.NUM_FRAMES, scenes.SIZE, scenes.SIZE)
    assert -1 <= first.min() < first.max() <= 1


@pytest.mark.parametrize("motion", scenes.MOTIONS)
def test_figures_stay_inside_and_never_overlap(motion: str) -> None:
    scene = Scene((("red", "square"), ("green", "circle")), "black", motion)
    for seed in range(20):
        clip = (scenes.render(scene, torch.Generator().manual_seed(seed)) + 1) / 2
        red, green = (clip[0] > 0.5), (clip[1] > 0.35) & (clip[0] < 0.4)
        border = torch.ones(scenes.SIZE, scenes.SIZE, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        assert not ((red | green) & border).any()
        for frame in range(scenes.NUM_FRAMES):
            rows = [set(mask[frame].any(1).nonzero().flatten().tolist()) for mask in (red, green)]
            columns = [
                set(mask[frame].any(0).nonzero().flatten().tolist()) for mask in (red, green)
            ]
            assert not rows[0] & rows[1] or not columns[0] & columns[1]


def test_collage_is_reproducible() -> None:
    first, second = (
        scenes.render_collage(torch.Generator().manual_seed(1), 2, 5, 32) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (2, 3, 5, 32, 32)
