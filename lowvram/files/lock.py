"""A lock per output, held by one process, with the holder's id in the lock file."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, Timeout

from lowvram.errors import OutputError
from lowvram.files.write import output_error, refuse_foreign

LOCK_NAME = ".lowvram.lock"
# Windows lets nobody read or write a locked file, so the holder's id stands in a file beside it.
HOLDER_SUFFIX = ".pid" if os.name == "nt" else ""
# How file systems without locks refuse one.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
TIMEOUT_S = 0.1  # covers a holder that removes its file between our open and our lock
_log = logging.getLogger(__name__)


class OutputLock:
    """Held from construction to `release`; the system frees it when the process dies.

    output: a folder, made if there is none, or a file in a folder that exists. On a file system
    without locks the process named in the lock file decides.
    Raises `OutputError` naming the process that holds it.
    """

    def __init__(self, output: Path, *, is_file: bool = False) -> None:
        self.output = output
        folder, name = output, LOCK_NAME
        if is_file:
            folder, name = output.parent, f".{_digest(output.name)}{LOCK_NAME}"
        self.path = folder / name
        self.holder_path = folder / (name + HOLDER_SUFFIX)
        self._held = False
        self._lock = FileLock(
            self.path, timeout=TIMEOUT_S, poll_interval=TIMEOUT_S / 5, thread_local=False
        )
        try:
            if not is_file:
                folder.mkdir(parents=True, exist_ok=True)
            refuse_foreign(self.path)
            refuse_foreign(self.holder_path)
            self._acquire()
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
        """Free the lock and remove its file; a second call does nothing."""
        if not self._held:
            return
        self._held = False
        # While the lock is held: a waiting process finds its inode unlinked and tries again.
        with suppress(OSError):
            self.holder_path.unlink(missing_ok=True)
        self._lock.release()
        if HOLDER_SUFFIX:
            with suppress(OSError):  # another process may hold it by now
                self.path.unlink(missing_ok=True)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise self._refusal(_read_holder(self.holder_path)) from None
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            _log.info("%s: no locks here: the process named in the file decides", self.path)
        try:
            # Some file systems grant every lock, so the named process must be dead as well.
            holder = _read_holder(self.holder_path)
            if holder and holder == _process(holder.get("pid")):
                raise self._refusal(holder)
            if holder:
                _log.warning(
                    "took over %s, left by process %s, which is gone", self.path, holder.get("pid")
                )
            self.holder_path.write_text(json.dumps(_process(os.getpid())), encoding="utf-8")
            self._held = True
        except BaseException:
            self._lock.release()
            raise

    def _refusal(self, holder: dict[str, object]) -> OutputError:
        return OutputError(
            f"{self.output} is being written by process {holder.get('pid', '?')}: wait for it or "
            f"stop it"
        )


def _digest(name: str) -> str:
    """A short name for the lock of a file: with a suffix the file's own could become too long."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _process(pid: object) -> dict[str, object]:
    """A process's id, start time and host, which tell it from later ones with the same id; empty
    where there is none.
    """
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


def _read_holder(path: Path) -> dict[str, object]:
    """The process named in the lock file; empty where there is none or the file is incomplete."""
    try:
        holder = json.loads(path.read_bytes()[:4096])
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}
