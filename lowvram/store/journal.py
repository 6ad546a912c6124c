"""Journal of an unfinished file: one JSON line per tensor, appended after its data is synced."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.errors import ResumeError
from lowvram.files.limits import JSON_BYTES, read_at_most
from lowvram.files.write import BINARY, write_all


@dataclass
class Journal:
    """An open journal.

    fd: file descriptor; hashes: SHA-256 by tensor name, in the order of the lines; length: bytes of
    the complete lines.
    """

    path: Path
    fd: int
    hashes: dict[str, str]
    length: int = 0

    @classmethod
    def create(cls, path: Path, identity: dict[str, str]) -> Journal:
        """Create or overwrite the journal; its first line is `identity`. Raises `OSError`."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        journal = cls(path, fd, {})
        journal._write([{"identity": identity}])
        return journal

    @classmethod
    def reopen(cls, path: Path, identity: dict[str, str]) -> Journal | None:
        """Open the journal at `path`, dropping a truncated last line; None without a usable one.

        Raises `ResumeError` when its identity differs from `identity`.
        """
        if not path.exists():
            return None
        lines, length = _complete_lines(path)
        if not lines:
            return None
        _check_identity(path, lines[0].get("identity"), identity)
        fd = os.open(path, os.O_RDWR | BINARY)
        return cls(path, fd, {line["name"]: line["sha256"] for line in lines[1:]}, length)

    def append(self, hashes: dict[str, str]) -> None:
        """Append and sync the hashes of tensors whose data are already synced. Raises `OSError`."""
        self._write([{"name": name, "sha256": digest} for name, digest in hashes.items()])
        self.hashes |= hashes

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        os.ftruncate(self.fd, self.length)  # drop the remains of an interrupted write
        os.lseek(self.fd, self.length, os.SEEK_SET)
        write_all(self.fd, text)
        os.fsync(self.fd)
        self.length += len(text)

    def close(self) -> None:
        """Close the file descriptor."""
        os.close(self.fd)


def _complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines before the first truncated or invalid one, and their length in bytes."""
    lines: list[dict[str, Any]] = []
    length = 0
    try:
        content = read_at_most(path, JSON_BYTES)
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path} cannot be read ({error}): start again without --resume"
        ) from error
    for raw in content.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            break
        keys = ("name", "sha256") if lines else ("identity",)
        if not raw.endswith(b"\n") or not isinstance(line, dict) or set(line) != set(keys):
            break
        lines.append(line)
        length += len(raw)
    return lines, length


def _check_identity(path: Path, found: Any, wanted: dict[str, str]) -> None:
    """Raise `ResumeError` that names every difference between the identities."""
    if not isinstance(found, dict):
        raise ResumeError(f"{path} is damaged: start again without --resume")
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing:
        texts = [
            f"{key} was {found.get(key)!r} and is now {wanted.get(key)!r}" for key in differing
        ]
        name = path.name.removesuffix(".partial.journal")
        raise ResumeError(
            f"cannot resume {name}: {'; '.join(texts)}: use the same values, or start again "
            f"without --resume"
        )
