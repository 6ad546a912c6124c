"""Names of output videos: checks before a run, and a fresh name where the user gives none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from lowvram.errors import OutputError, UsageError
from lowvram.files.write import PARTIAL, output_error, refuse_foreign

PART = ".part"  # ends the name of a video that is being written
RESUME = ".resume"  # ends the name of the state of an interrupted run
SUFFIXES = (RESUME + PARTIAL, RESUME, PART)


def check_output(path: Path, overwrite: bool) -> None:
    """Check before a run that a video, and the files beside it, can be written.

    Raises `UsageError`, `OutputError`.
    """
    try:
        check_name(path, overwrite)
        for suffix in SUFFIXES:
            refuse_foreign(path.with_name(path.name + suffix))
    except OSError as error:
        raise output_error(path, error) from error
    try:
        # Write a file: permissions do not reveal a read-only file system.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise output_error(path.parent, error) from error


def check_name(path: Path, overwrite: bool) -> None:
    """Check the name of a video to write, and what has that name. Raises as `check_output`."""
    if path.suffix.lower() != ".mp4":
        raise UsageError(
            f"output {path} is not an .mp4 file: use "
            f"{path.with_suffix('.mp4') if path.name else 'clip.mp4'}"
        )
    if not path.parent.is_dir():
        raise OutputError(f"output folder {path.parent} does not exist: create it first")
    if path.is_dir():
        raise OutputError(f"output {path} is a folder: give a file name")
    if path.exists() and not overwrite:
        raise OutputError(
            f"output {path} already exists: use --overwrite to replace it, or another name"
        )


def fresh_outputs(folder: Path, resume: bool = False) -> Iterator[Path]:
    """`clip.mp4`, `clip-2.mp4` and so on, without those that exist.

    resume: first that of the newest interrupted run, if there is one.
    """
    if resume:
        states = [state for state in folder.glob(f"clip*.mp4{RESUME}") if state.is_file()]
        if states:
            yield max(states, key=lambda state: state.stat().st_mtime).with_suffix("")
    names = chain(["clip.mp4"], (f"clip-{number}.mp4" for number in count(2)))
    for name in names:
        if not any((folder / (name + suffix)).exists() for suffix in ("", RESUME)):
            yield folder / name
