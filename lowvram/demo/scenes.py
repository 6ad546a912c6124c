"""Captions and synthetic clips of colored shapes that move, grow or bounce."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
}
GROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "grow", "bounce")
SIZE = 64
NUM_FRAMES = 9
FPS = 8


@dataclass(frozen=True)
class Scene:
    """Content of a clip.

    figures: one or two (color, shape) pairs with the same motion; ground: color of the background.
    """

    figures: tuple[tuple[str, str], ...]
    ground: str
    motion: str

    def caption(self) -> str:
        """The scene as an English sentence, the prompt of the clip."""
        names = " and ".join(f"a {color} {shape}" for color, shape in self.figures)
        ending = "" if len(self.figures) > 1 else "s"
        verb = f"move{ending} {self.motion}" if self.motion in MOTIONS[:4] else self.motion + ending
        return f"{names} {verb} on a {self.ground} background"


def all_scenes() -> list[Scene]:
    """All scenes of one figure, then all scenes of two figures of different colors."""
    figures = [(color, shape) for color in COLORS for shape in SHAPES]
    groups: list[tuple[tuple[str, str], ...]] = [(figure,) for figure in figures]
    groups += [(first, second) for first in figures for second in figures if first[0] != second[0]]
    return [
        Scene(group, ground, motion) for group in groups for ground in GROUNDS for motion in MOTIONS
    ]


def split(scene: Scene) -> str:
    """The data split of a scene: `train`, `validation` or `test`, by the caption's checksum."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(scene.caption().encode()) % 10, "train")


def coverage(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased coverage of each pixel by `shape`, in 0..1.

    dx, dy: pixel minus center of the shape; radius: circumradius; all in pixels, broadcastable.
    """
    if shape == "circle":
        distance = (dx * dx + dy * dy).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - radius * 0.88
    else:  # an equilateral triangle that points up, with a centered bounding box
        y = dy - radius * 0.25
        side = torch.maximum(0.866 * dx.abs() - 0.5 * y, y)
        distance = side - radius * 0.62
    return (0.5 - distance).clamp(0, 1)


def render(
    scene: Scene,
    generator: torch.Generator | None = None,
    num_frames: int = NUM_FRAMES,
    size: int = SIZE,
) -> Tensor:
    """Draw a scene; returns [3, num_frames, size, size] float in -1..1.

    generator: varies position, size and speed.
    """
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    py, px = axis.view(1, size, 1), axis.view(1, 1, size)
    time = torch.linspace(0, 1, num_frames).view(-1, 1, 1)
    unit = size / 64
    frames = (
        torch.tensor(GROUNDS[scene.ground])
        .view(3, 1, 1, 1)
        .expand(3, num_frames, size, size)
        .clone()
    )
    two = len(scene.figures) == 2

    def vary(extent: float) -> float:
        return extent * (2 * torch.rand((), generator=generator).item() - 1) if generator else 0.0

    # All figures have the same motion. Two figures are side by side, perpendicular to the motion,
    # the first one left or above, and do not overlap.
    lanes = (17.0, 47.0) if two else (32.0,)
    travel, delay = 28 * (1 + vary(0.15)), vary(3)
    for (color, shape), lane in zip(scene.figures, lanes, strict=True):
        radius = torch.full_like(time, (10.5 if two else 13.5) + vary(1))
        across = torch.full_like(time, lane + vary(1.5 if two else 6))
        if scene.motion == "grow":
            largest = (14.0 if two else 20.0) + vary(1)
            radius = 5 + time * (largest - 5)
            along = torch.full_like(time, 32 + delay)
        elif scene.motion == "bounce":  # down and up again
            along = 32 + delay + (0.5 - (2 * time - 1).abs()) * travel
        else:
            along = (
                32
                + delay
                + (time - 0.5) * travel * (1 if scene.motion in ("right", "down") else -1)
            )
        cx, cy = (along, across) if scene.motion in ("left", "right") else (across, along)
        alpha = coverage(shape, px - cx * unit, py - cy * unit, radius * unit)
        frames = frames * (1 - alpha) + torch.tensor(COLORS[color]).view(3, 1, 1, 1) * alpha
    return frames * 2 - 1


def render_collage(
    generator: torch.Generator, batch: int, num_frames: int, size: int, figures: int = 6
) -> Tensor:
    """Draw many random moving shapes, to train a VAE on edges and colors.

    Returns [batch, 3, num_frames, size, size] float in -1..1.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    palette = torch.tensor([*COLORS.values(), *GROUNDS.values()])

    def colors() -> Tensor:
        index = torch.randint(len(palette), (batch,), generator=generator)
        jitter = 0.04 * torch.randn(batch, 3, generator=generator)
        return (palette[index] + jitter).clamp(0, 1).view(batch, 3, 1, 1, 1)

    axis = torch.arange(size, dtype=torch.float32) + 0.5
    py, px = axis.view(1, 1, size, 1), axis.view(1, 1, 1, size)
    time = torch.arange(num_frames, dtype=torch.float32).view(1, -1, 1, 1)
    frames = colors().expand(batch, 3, num_frames, size, size)
    for _ in range(figures):
        cx, cy = (
            (uniform(batch, 1, 1, 1) * 1.3 - 0.15) * size,
            (uniform(batch, 1, 1, 1) * 1.3 - 0.15) * size,
        )
        # only a few are fast
        vx, vy = (
            5 * v + 240 * v**5
            for v in (uniform(batch, 1, 1, 1) - 0.5, uniform(batch, 1, 1, 1) - 0.5)
        )
        radius = 3 + uniform(batch, 1, 1, 1) * 11
        growth = (uniform(batch, 1, 1, 1) - 0.3).clamp(min=0) * 1.2
        dx, dy, r = px - cx - vx * time, py - cy - vy * time, radius + growth * time
        kind = torch.randint(3, (batch, 1, 1, 1), generator=generator)
        alpha = torch.zeros(batch, num_frames, size, size)
        for number, shape in enumerate(SHAPES):
            alpha = torch.where(kind == number, coverage(shape, dx, dy, r), alpha)
        alpha = alpha.unsqueeze(1)
        frames = frames * (1 - alpha) + colors() * alpha
    return frames * 2 - 1
