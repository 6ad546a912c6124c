"""Read small files of a model folder without following names or links out of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from lowvram.errors import CheckpointError, UnsafeFileError, UsageError
from lowvram.files.checked import checked
from lowvram.files.limits import CONFIG_BYTES, JSON_BYTES, check_values

DOWNLOAD = "download it again"
LFS_POINTER = b"version https://git-lfs"
T = TypeVar("T")


def check_plain_name(name: str, where: Path) -> str:
    """Return `name` if it is a plain file name on every operating system.

    where: the file that contains the name, for the message. Raises `UnsafeFileError` for anything
    else, such as absolute, drive and UNC paths.
    """
    odd = (
        name in ("", ".", "..")
        or re.search(r'[/\\:\x00-\x1f\x7f<>"|?*]', name)
        or name.endswith((" ", "."))
    )
    if odd or len(name) > 255 or not name.isprintable():
        raise UnsafeFileError(
            f"{where} names the file {name[:120]!r}, which is not a plain file name: do not "
            f"use this model folder"
        )
    return name


# Whether links may point out of a model's folder, for weights that are kept on another disk.
_links_allowed = ContextVar("links_allowed", default=False)


@contextmanager
def links_allowed(allowed: bool) -> Iterator[None]:
    """Open model folders whose links point out of them, if `allowed`."""
    token = _links_allowed.set(allowed)
    try:
        yield
    finally:
        _links_allowed.reset(token)


def inside(root: Path, path: Path) -> Path:
    """Return `path` if it resolves to a file in `root`, or in the blobs of the hub cache of `root`,
    or if links are allowed.

    Raises `UnsafeFileError` for a link that points elsewhere.
    """
    if _links_allowed.get():
        return path
    # realpath: `resolve` raises on links that lead in a circle
    home, target = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise UnsafeFileError(
            f"{path} is a link out of its model folder (to {target}): pass --allow-links if you "
            f"made it, or replace it with the file itself"
        )
    return path


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise `CheckpointError` if a file that begins with `start` is a Git LFS pointer: a text of
    some 130 bytes in place of the file itself.
    """
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, "
            f"or download it with `hf download`"
        )


def read_bytes(
    root: Path, path: Path, cap_bytes: int = JSON_BYTES, advice: str = DOWNLOAD
) -> bytes:
    """Read a file of at most `cap_bytes` in the model folder `root`.

    Raises `CheckpointError`, whose message ends with `advice`.
    """
    inside(root, path)
    try:
        if not path.parent.is_dir():
            raise CheckpointError(f"the folder {path.parent} is missing: {advice}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {advice}")
        with open(path, "rb") as file:
            content = file.read(cap_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}: {advice}") from error
    refuse_pointer(path, content)
    if len(content) > cap_bytes:
        raise CheckpointError(
            f"{path} is larger than {cap_bytes} bytes, the limit for such a file: {advice}"
        )
    return content


def read_json(
    root: Path, path: Path, cap_bytes: int = JSON_BYTES, advice: str = DOWNLOAD
) -> dict[str, Any]:
    """Read a JSON object from a file of at most `cap_bytes` in the model folder `root`.

    Raises `CheckpointError`, whose message ends with `advice`.
    """
    try:
        text = read_bytes(root, path, cap_bytes, advice)
        check_values(text)
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}: {advice}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: {advice}")
    return data


def read_settings(root: Path, path: Path, kind: type[T], cap_bytes: int = CONFIG_BYTES) -> T:
    """The JSON object in a configuration file as `kind`, a msgspec struct.

    Raises `CheckpointError` naming the file, the key, its value and what is expected.
    """
    data = read_json(root, path, cap_bytes)
    try:
        return checked(data, kind)
    except (ValueError, UsageError) as error:
        raise CheckpointError(f"{path}: {error}") from error
