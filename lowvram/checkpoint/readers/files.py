"""Read small files of a model folder without following names or links out of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lowvram.errors import CheckpointError, UnsafeFileError

JSON_CAP_BYTES = 64 * 2**20  # UMT5's tokenizer.json has 17 MB
DOWNLOAD = "download it again"


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


def inside(root: Path, path: Path) -> Path:
    """Return `path` if it resolves to a file in `root`, or in the blobs of the hub cache of `root`.

    Raises `UnsafeFileError` for a link that points elsewhere.
    """
    home, target = root.resolve(), path.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise UnsafeFileError(
            f"{path} is a link out of its model folder (to {target}): replace it with the file "
            f"itself"
        )
    return path


def read_bytes(
    root: Path, path: Path, cap_bytes: int = JSON_CAP_BYTES, advice: str = DOWNLOAD
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
    if len(content) > cap_bytes:
        raise CheckpointError(
            f"{path} is larger than {cap_bytes} bytes, the limit for such a file: {advice}"
        )
    return content


def read_json(
    root: Path, path: Path, cap_bytes: int = JSON_CAP_BYTES, advice: str = DOWNLOAD
) -> dict[str, Any]:
    """Read a JSON object from a file of at most `cap_bytes` in the model folder `root`.

    Raises `CheckpointError`, whose message ends with `advice`.
    """
    try:
        data = json.loads(read_bytes(root, path, cap_bytes, advice).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}: {advice}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: {advice}")
    return data


class Settings:
    """Type-checked access to a JSON object read from `path`.

    Methods raise `CheckpointError`, naming file and key, for missing keys and invalid values.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    def integer(self, key: str, default: int | None = None, high: int = 2**20) -> int:
        """An integer in 1 .. `high`; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise self._error(key, value, f"an integer from 1 to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number below 1e9 in magnitude; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e9:
            raise self._error(key, value, "a finite number")
        return float(value)

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A list of 1 to 16 integers, each as in `integer`; without a default it is required."""
        value = self._value(key, default)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
            raise self._error(key, value, "a list of integers")
        return tuple(Settings(self.path, {key: item}).integer(key) for item in value)

    def booleans(self, key: str, default: tuple[bool, ...]) -> tuple[bool, ...]:
        """A list of at most 16 booleans."""
        value = self._value(key, default)
        if (
            not isinstance(value, (list, tuple))
            or len(value) > 16
            or not all(isinstance(item, bool) for item in value)
        ):
            raise self._error(key, value, "a list of true and false")
        return tuple(value)

    def require(self, key: str, *allowed: Any) -> None:
        """Raise unless the key is absent or its value is one of `allowed`."""
        if key in self.data and self.data[key] not in allowed:
            raise self._error(
                key,
                self.data[key],
                " or ".join(repr(item) for item in allowed) + ", the only values supported",
            )

    def _value(self, key: str, default: Any) -> Any:
        value = self.data.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the key {key!r}: {DOWNLOAD}")
        return value

    def _error(self, key: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is {repr(value)[:80]}, expected {wanted}")
