"""Durable, atomic writes, and readable errors of the file system."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowvram.errors import DiskFullError, OutputError
from lowvram.units import format_bytes

BINARY = getattr(os, "O_BINARY", 0)  # without it Windows would write \r\n for every byte 10
PARTIAL = ".partial"  # ends the name of a file that is still being written
# How file systems refuse to sync a folder: network and FUSE mounts, drives of Windows under WSL.
_NO_FOLDER_SYNC = tuple(
    getattr(errno, name, errno.EINVAL)  # not every system has all of them
    for name in ("EINVAL", "EIO", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EACCES", "EPERM")
)
MAKE_ROOM = "make room and run it again"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    errno.EEXIST: "it is a file: choose a folder that does not exist",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.EISDIR: "it is a folder: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file system (FAT32 holds 4 GB a file) or a limit (ulimit -f) allows no file "
    "of this size: choose another disk or raise the limit",
    errno.EACCES: "choose another folder or change its permissions",
    errno.EPERM: "choose another folder or change its permissions",
}


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, in as many writes as needed. Raises `OSError`."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def output_error(path: Path, error: OSError, advice: str = MAKE_ROOM) -> OutputError:
    """The `OutputError` for an `OSError` while writing `path`; `DiskFullError`, with `advice`, if
    there is no room.
    """
    if error.errno in _NO_ROOM:
        return DiskFullError(f"no room to write {path} ({error.strerror}): {advice}")
    remedy = _ADVICE.get(error.errno or 0, "choose another folder or disk")
    return OutputError(f"cannot write {path}: {error.strerror or error}: {remedy}")


def check_room(path: Path, needed_bytes: int) -> None:
    """Raises `DiskFullError` if the file system of `path` has less than `needed_bytes` free."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskFullError(
            f"{path} needs {format_bytes(needed_bytes)}, but {folder} has "
            f"{format_bytes(free_bytes)} free: make room first"
        )


def refuse_foreign(path: Path, *, folder: bool = False) -> None:
    """Raise `OutputError` if something that lowvram did not write has this name.

    Its temporary files are regular files (`folder`: its temporary folders, folders). A link, a pipe
    or a device of that name would send what is written elsewhere. Raises `OSError`.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
        kind = kinds.get(stat.S_IFMT(mode), "no regular file")
        wanted = "a folder" if folder else "a file"
        raise OutputError(
            f"{path} is {kind}, where lowvram keeps {wanted} of its own: remove or rename it"
        )


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, on systems and file systems that can sync a folder."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


@contextmanager
def replacing(
    path: Path,
    partial: Path | None = None,
    durable: bool = True,
    made: bool = False,
    advice: str = MAKE_ROOM,
) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends and removed when it raises.

    `path` holds either its old content or all of the new one, at any moment. partial: the file
    written to, by default `path` with `.partial`; durable: sync file and folder, so that the rename
    survives a power cut; made: the caller has just made `partial`; otherwise what an earlier run
    left there is removed first; advice: what to do where the disk is full. Raises `OutputError` in
    place of `OSError`.
    """
    partial = partial or path.with_name(path.name + PARTIAL)
    try:
        refuse_foreign(partial)
        if not made:
            partial.unlink(missing_ok=True)  # it may have other names
    except OSError as error:
        raise output_error(path, error, advice) from error
    try:
        yield partial
        if durable:
            _sync_file(partial)
        os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise output_error(path, error, advice) from error
        raise


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | BINARY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes, advice: str = MAKE_ROOM) -> None:
    """Replace `path` atomically by `content`; see `replacing`. Raises `OutputError`."""
    with replacing(path, advice=advice) as partial:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        try:
            write_all(fd, content)
        finally:
            os.close(fd)
