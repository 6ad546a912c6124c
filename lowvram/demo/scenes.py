"""Captions and the clips they describe: coloured shapes that move or grow on a coloured ground."""

from __future__ import annotations

import random
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
MOTIONS = ("left", "right", "up", "down", "grow")
SIZE = 64
NUM_FRAMES = 9
FPS = 8


@dataclass(frozen=True)
class Scene:
    """What a caption says. `figures` holds one or two (colour, shape) pairs; all of them share one motion."""

    figures: tuple[tuple[str, str], ...]
    ground: str
    motion: str

    def caption(self) -> str:
        names = " and ".join(f"a {color} {shape}" for color, shape in self.figures)
        ending = "" if len(self.figures) > 1 else "s"
        verb = f"move{ending} {self.motion}" if self.motion in MOTIONS[:4] else self.motion + ending
        return f"{names} {verb} on a {self.ground} background"


def random_scene(rng: random.Random, two_figures: float) -> Scene:
    """A scene, with two figures in that share of cases, whose figures differ in colour from each other."""
    ground = rng.choice(list(GROUNDS))
    count = 2 if rng.random() < two_figures else 1
    colors = rng.sample(list(COLORS), count)
    figures = tuple((color, rng.choice(SHAPES)) for color in colors)
    return Scene(figures, ground, rng.choice(MOTIONS))


def all_scenes() -> list[Scene]:
    """Every scene of one figure."""
    return [Scene(((color, shape),), ground, motion) for ground in GROUNDS for color in COLORS for shape in SHAPES for motion in MOTIONS]


def is_held_out(scene: Scene) -> bool:
    """About one caption in seven is never trained on, chosen by its checksum: the model is judged by these."""
    return zlib.crc32(scene.caption().encode()) % 10 == 0


def coverage(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased cover of each pixel in 0..1 by `shape`; dx, dy: pixel minus centre; radius: circumradius in pixels."""
    if shape == "circle":
        distance = (dx * dx + dy * dy).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - radius * 0.88
    else:  # an equilateral triangle that points up, lifted so that its box is centred
        y = dy - radius * 0.25
        side = torch.maximum(0.866 * dx.abs() - 0.5 * y, y)
        distance = side - radius * 0.62
    return (0.5 - distance).clamp(0, 1)


def render(scene: Scene, num_frames: int = NUM_FRAMES, size: int = SIZE) -> Tensor:
    """Draws `scene`, always in the same place, speed and size. Returns [3, num_frames, size, size] float in -1..1."""
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    py, px = axis.view(1, size, 1), axis.view(1, 1, size)
    time = torch.linspace(0, 1, num_frames).view(-1, 1, 1)
    unit = size / 64
    frames = torch.tensor(GROUNDS[scene.ground]).view(3, 1, 1, 1).expand(3, num_frames, size, size).clone()
    two = len(scene.figures) == 2
    travel = 28 * unit
    # Two figures share the motion, so they stand side by side across it and never overlap.
    lanes = (0.28, 0.72) if two else (0.5,)
    for (color, shape), lane in zip(scene.figures, lanes, strict=True):
        radius = torch.full_like(time, 9.5 if two else 13.5) * unit
        across = torch.full_like(time, lane * size)
        if scene.motion in ("left", "right"):
            path = size / 2 + (time - 0.5) * travel * (1 if scene.motion == "right" else -1)
            cx, cy = path, across
        elif scene.motion in ("up", "down"):
            path = size / 2 + (time - 0.5) * travel * (1 if scene.motion == "down" else -1)
            cx, cy = across, path
        else:
            largest = 13.5 if two else 20.0
            radius = (5 + time * (largest - 5)) * unit
            cx, cy = across, torch.full_like(time, 0.5 * size)
        alpha = coverage(shape, px - cx, py - cy, radius)
        frames = frames * (1 - alpha) + torch.tensor(COLORS[color]).view(3, 1, 1, 1) * alpha
    return frames * 2 - 1


def render_collage(generator: torch.Generator, batch: int, num_frames: int, size: int, figures: int = 6) -> Tensor:
    """Crowds of moving shapes that teach a VAE edges and colours. Returns [batch, 3, num_frames, size, size] in -1..1."""

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
        cx, cy = (uniform(batch, 1, 1, 1) * 1.3 - 0.15) * size, (uniform(batch, 1, 1, 1) * 1.3 - 0.15) * size
        vx, vy = (5 * v + 240 * v**5 for v in (uniform(batch, 1, 1, 1) - 0.5, uniform(batch, 1, 1, 1) - 0.5))  # few are fast
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
