"""One writer per output folder: a lock file that names its process, freed by the system when that
process dies.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from types import TracebackType

import psutil

from lowvram.errors import OutputError
from lowvram.files.io import output_error, write_all

try:
    import fcntl
except ImportError:  # Windows: the process id alone decides
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lowvram.lock"
_log = logging.getLogger(__name__)


class OutputLock:
    """Held from construction to `release`. Raises `OutputError` that names the process which holds
    it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd: int | None = self._acquire()
        except OSError as error:
            raise output_error(self.path, error) from error

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        if self._fd is None:
            return
        if fcntl is not None:
            # Removed while it is still held: who opened it before sees that its file is no longer
            # the one at the path.
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None
        if fcntl is None:  # Windows does not remove an open file
            self.path.unlink(missing_ok=True)

    def _acquire(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take(fd)
                if self._is_current(fd):
                    os.ftruncate(fd, 0)
                    os.lseek(fd, 0, os.SEEK_SET)
                    write_all(fd, json.dumps(_process(os.getpid())).encode())
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _take(self, fd: int) -> None:
        holder = _read_holder(fd)
        if fcntl is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._refusal(_read_holder(fd)) from None
        # Some file systems grant every lock, so the process that the file names must be dead as
        # well.
        if (
            holder
            and holder.get("host") == socket.gethostname()
            and holder == _process(holder.get("pid"))
        ):
            raise self._refusal(holder)
        if holder:
            _log.warning(
                "took over %s, left by process %s, which is gone", self.path, holder.get("pid")
            )

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self, holder: dict[str, object]) -> OutputError:
        return OutputError(
            f"{self.path.parent} is being written by process {holder.get('pid', '?')}: wait "
            f"for it or stop it"
        )


def _process(pid: object) -> dict[str, object]:
    """What tells a process from a later one with the same id; empty where there is none."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return {}
    try:
        return {
            "pid": pid,
            "started": psutil.Process(pid).create_time(),
            "host": socket.gethostname(),
        }
    except (psutil.Error, OverflowError):
        return {}


def _read_holder(fd: int) -> dict[str, object]:
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        holder = json.loads(os.read(fd, 4096))
    except ValueError:  # empty, or cut while it was written
        return {}
    return holder if isinstance(holder, dict) else {}
