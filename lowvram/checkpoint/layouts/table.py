"""The table of supported checkpoint layouts: how each is recognized and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowvram.checkpoint.layouts.diffusers import looks_diffusers, read_diffusers
from lowvram.checkpoint.layouts.official import looks_official, read_official
from lowvram.checkpoint.layouts.parts import Parts
from lowvram.errors import CheckpointError


@dataclass(frozen=True)
class Layout:
    """One supported layout.

    name: its name in the manifest; title: its name in error messages; holds: the files that
    identify it, for error messages.
    looks: tells whether a folder has the layout; read: reads the headers and configs of all
    components of a folder, given whether pickles are allowed.
    """

    name: str
    title: str
    holds: str
    looks: Callable[[Path], bool]
    read: Callable[[Path, bool], Parts]


LAYOUTS = (
    Layout(
        "official",
        "the official layout",
        "high_noise_model/ and low_noise_model/ (official)",
        looks_official,
        read_official,
    ),
    Layout(
        "diffusers",
        "the diffusers layout",
        "transformer/ and transformer_2/ (diffusers)",
        looks_diffusers,
        lambda root, allow_pickle: read_diffusers(root),
    ),
)


def is_checkpoint(path: Path) -> bool:
    """Whether the folder has any of the supported layouts."""
    return any(layout.looks(path) for layout in LAYOUTS)


def model_folder(path: Path) -> Path:
    """The folder of the model: `path`, or the snapshot in it where `path` is a folder of the cache
    of huggingface_hub.

    Raises `CheckpointError` where it cannot be told which snapshot is meant.
    """
    snapshots = path / "snapshots"
    if is_checkpoint(path) or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    try:
        found = sorted(item.name for item in snapshots.iterdir() if item.is_dir())
        named = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}: give one of the folders in {snapshots}"
        ) from error
    if named in found:
        return snapshots / named
    if len(found) == 1:
        return snapshots / found[0]
    raise CheckpointError(
        f"{path} is a folder of the hub cache with {len(found)} snapshots: give one of them, such "
        f"as {snapshots}/{found[0] if found else 'REVISION'}"
    )


def layout_of(path: Path) -> Layout:
    """The layout of a folder. Raises `CheckpointError` when it has none or several."""
    found = [layout for layout in LAYOUTS if layout.looks(path)]
    if len(found) > 1:
        mixed = " and ".join(layout.title for layout in found)
        raise CheckpointError(f"{path} mixes {mixed}: keep one of them")
    if not found:
        wanted = " nor ".join(layout.holds for layout in LAYOUTS)
        raise CheckpointError(
            f"{path} contains neither {wanted}: give the folder of the whole model"
        )
    return found[0]
