"""Recognize background, figures, shapes and motion in the pixels of a demo clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvram.demo.scenes import COLORS, GROUNDS, Scene

UNKNOWN = "unknown"
COLOR_TOLERANCE = 0.3  # RGB distance (channels in 0..1) within which a color is recognized
SECOND_FIGURE = 0.12  # minimum size of a second figure's core, relative to the first one's
MIN_CORE = 6  # minimum pixels of a figure's core in a frame that is measured
GROWTH = 1.9  # minimum ratio of last to first area of a growing figure
TRAVEL = 8.0  # minimum distance of a moving figure, in pixels of a 64-pixel frame

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
# Fill of the bounding box, and width of the upper third over width of the lower third.
SHAPE_PROTOTYPES = {"circle": (0.79, 1.0), "square": (0.97, 1.0), "triangle": (0.54, 0.25)}


@dataclass(frozen=True)
class Match:
    """Which attributes of a clip match its caption; true if all four do."""

    ground: bool
    colors: bool
    shapes: bool
    motion: bool

    def __bool__(self) -> bool:
        return self.ground and self.colors and self.shapes and self.motion


def matches(frames: Any, scene: Scene) -> Match:
    """Compare a clip with a scene, ignoring the order of two figures.

    frames: [F, H, W, 3] uint8, numpy or torch. Raises `ValueError` for any other shape or dtype.
    """
    found = describe(frames)
    colors = sorted(color for color, _ in found.figures) == sorted(
        color for color, _ in scene.figures
    )
    shapes = sorted(found.figures) == sorted(scene.figures) if colors else False
    return Match(found.ground == scene.ground, colors, shapes, found.motion == scene.motion)


def describe(frames: Any) -> Scene:
    """Recognize the scene of a clip from its pixels.

    frames: [F, H, W, 3] uint8, numpy or torch. Attributes that are not recognized are `unknown`;
    `figures` may be empty. Raises `ValueError` for any other shape or dtype.
    """
    pixels = np.asarray(frames)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"frames are {pixels.dtype} {pixels.shape}, expected [F, H, W, 3] uint8")
    clip = pixels.astype(np.float64) / 255
    edge = np.concatenate(
        [
            clip[:, :2].reshape(-1, 3),
            clip[:, -2:].reshape(-1, 3),
            clip[:, :, :2].reshape(-1, 3),
            clip[:, :, -2:].reshape(-1, 3),
        ]
    )
    ground = np.median(edge, axis=0)
    name = _name(ground, GROUNDS)
    figures, motions = [], set()
    for color, core in _figure_cores(clip, ground, name).items():
        cover = _cover(clip, core, ground)
        figures.append((color, _shape(cover, core)))
        motions.add(_motion(cover, core))
    return Scene(tuple(figures), name, motions.pop() if len(motions) == 1 else UNKNOWN)


def _name(color: Floats, names: dict[str, tuple[float, float, float]]) -> str:
    nearest = min(names, key=lambda name: float(np.linalg.norm(color - names[name])))
    return nearest if np.linalg.norm(color - names[nearest]) < COLOR_TOLERANCE else UNKNOWN


def _figure_cores(clip: Floats, ground: Floats, ground_name: str) -> dict[str, Mask]:
    """Masks [F, H, W] of the pixels inside each figure, by color.

    All 3 x 3 neighbors of such a pixel have the same color, which excludes blurred edges.
    """
    names = [color for color in COLORS if color != ground_name]
    palette = np.stack([ground, *(np.array(COLORS[name]) for name in names)])
    classes = ((clip[..., None, :] - palette) ** 2).sum(-1).argmin(-1)
    cores = {name: _eroded(classes == number) for number, name in enumerate(names, 1)}
    largest = sorted(cores, key=lambda name: int(cores[name].sum()), reverse=True)[:2]
    enough = max(SECOND_FIGURE * cores[largest[0]].sum(), MIN_CORE * len(clip))
    kept = [name for name in largest if cores[name].sum() >= enough]
    return {
        name: cores[name]
        for name in kept
        if _name(np.median(clip[cores[name]], axis=0), COLORS) == name
    }


def _eroded(mask: Mask) -> Mask:
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = mask.shape[1:]
    shifted = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    eroded: Mask = np.logical_and.reduce(shifted)
    return eroded


def _cover(clip: Floats, core: Mask, ground: Floats) -> Mask:
    """Mask [F, H, W] of a figure's pixels.

    They are closer to its color than to the background's, and near its core in the same frame.
    """
    color = np.median(clip[core], axis=0)
    axis = color - ground
    nearer = (clip - ground) @ axis > 0.5 * (axis @ axis)
    near_core = np.zeros_like(core)
    for frame, inside in enumerate(core):
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows):
            near_core[
                frame, max(0, rows[0] - 3) : rows[-1] + 4, max(0, columns[0] - 3) : columns[-1] + 4
            ] = True
    return nearer & near_core


def _measurable(core: Mask) -> NDArray[np.intp]:
    return np.flatnonzero(core.sum(axis=(1, 2)) >= MIN_CORE)


def _shape(cover: Mask, core: Mask) -> str:
    """Shape whose prototype is nearest to the median outline, without frames of few pixels."""
    area = cover.sum(axis=(1, 2))
    frames = [frame for frame in _measurable(core) if area[frame] >= 0.5 * area.max()]
    if not frames:
        return UNKNOWN
    measured = np.median([_outline(cover[frame]) for frame in frames], axis=0)
    return min(
        SHAPE_PROTOTYPES,
        key=lambda shape: float(np.linalg.norm((measured - SHAPE_PROTOTYPES[shape]) * (2.0, 0.6))),
    )


def _outline(mask: Mask) -> tuple[float, float]:
    """Filled share of the bounding box, and ratio of mean widths of its upper and lower third."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    third = max(1, len(box) // 3)
    return float(box.mean()), float(box[:third].mean() / max(box[-third:].mean(), 1e-6))


def _motion(cover: Mask, core: Mask) -> str:
    frames = _measurable(core)
    if len(frames) < len(cover) // 2:
        return UNKNOWN
    area = cover.sum(axis=(1, 2)).astype(np.float64)[frames]
    scale = 64 / cover.shape[1]
    x = np.array([np.nonzero(cover[frame])[1].mean() for frame in frames]) * scale
    y = np.array([np.nonzero(cover[frame])[0].mean() for frame in frames]) * scale
    if area[-3:].mean() > GROWTH * area[:3].mean():
        return "grow"
    across, down = x[-2:].mean() - x[:2].mean(), y[-2:].mean() - y[:2].mean()
    middle = len(frames) // 2
    fall = y[middle - 1 : middle + 2].mean() - (y[0] + y[-1]) / 2
    if fall > TRAVEL and fall > 2 * max(abs(across), abs(down)):
        return "bounce"
    if max(abs(across), abs(down)) < TRAVEL:
        return UNKNOWN
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"
