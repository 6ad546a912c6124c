"""Writes that survive a power cut, and errors of the file system in words."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from lowvram.config import format_bytes
from lowvram.errors import DiskFullError, OutputError

BINARY = getattr(os, "O_BINARY", 0)  # without it Windows would write \r\n for every byte 10
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data`, however short the single writes are. Raises `OSError`."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def output_error(path: Path, error: OSError, advice: str = "make room and run it again") -> OutputError:
    """What an `OSError` while writing `path` means; `DiskFullError` where room is the cause."""
    if error.errno in _NO_ROOM:
        return DiskFullError(f"no room to write {path} ({error.strerror}): {advice}")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def check_room(path: Path, needed_bytes: int) -> None:
    """Raises `DiskFullError` where the file system that will hold `path` has less than `needed_bytes` free."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskFullError(f"{path} needs {format_bytes(needed_bytes)}, but {folder} has {format_bytes(free_bytes)} free: make room first")


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable, where the system can open a folder."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes) -> None:
    """`path` holds either its old content or all of `content`, whatever happens. Raises `OutputError`."""
    partial = path.with_name(path.name + ".partial")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
