"""Writes that survive a power cut, and errors of the file system in words."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lowvram.config import format_bytes
from lowvram.errors import DiskFullError, OutputError

BINARY = getattr(os, "O_BINARY", 0)  # without it Windows would write \r\n for every byte 10
PARTIAL = ".partial"  # ends the name of a file that is still being written
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = {
    errno.EEXIST: "it is a file: choose a folder that does not exist",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.EISDIR: "it is a folder: choose another name",
    errno.EACCES: "choose another folder or change its permissions",
    errno.EPERM: "choose another folder or change its permissions",
}


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data`, however short the single writes are. Raises `OSError`."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def output_error(path: Path, error: OSError, advice: str = "make room and run it again") -> OutputError:
    """What an `OSError` while writing `path` means, and what to do; `DiskFullError`, with `advice`, where room is the cause."""
    if error.errno in _NO_ROOM:
        return DiskFullError(f"no room to write {path} ({error.strerror}): {advice}")
    remedy = _ADVICE.get(error.errno or 0, "choose another folder or disk")
    return OutputError(f"cannot write {path}: {error.strerror or error}: {remedy}")


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
    """`path` holds either its old content or all of `content`, whatever happens; an error leaves nothing else. Raises `OutputError`."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        try:
            write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise output_error(path, error) from error
        raise
