"""Reads that are retried, watched for hanging disks and cancelled."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lowvram.errors import CheckpointError

RETRY_DELAYS_S = (0.05, 0.25, 1.0)
READ_BYTES = 16 * 2**20  # at a time, so that a slow disk is told from one that hangs
SLOW_READ_S = 10.0
# without one byte: disks that spin up and network drives that come back take less
HANGING_READ_S = 300.0
STOP_GRACE_S = 2.0  # what a stopped run waits for reads under way, which write into its buffers
POLL_S = 0.25
CHECK_DISK = "check the disk and its cable, or copy the model to another one"
_log = logging.getLogger(__name__)


def read_at(fd: int, target: memoryview, offset: int, seeking: threading.Lock) -> int:
    """Read at most len(target) bytes at `offset`; returns their number. Raises `OSError`.

    seeking: held on systems with one position per open file (Windows).
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, [target], offset)
    with seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(target))
    target[: len(data)] = data
    return len(data)


class Reading:
    """One read in parts by several threads: its progress and the failures of its parts.

    over: set when all parts have ended, so that nothing writes into the buffers any more.
    """

    def __init__(self, what: str, parts: int, stopped: threading.Event | None = None) -> None:
        """what: start of the messages; stopped: set to cancel the read."""
        self.over = threading.Event()
        self._what, self._left, self._stopped = what, parts, stopped
        self._moved_s = time.monotonic()
        self._failures: dict[int, BaseException] = {}
        self._ending = threading.Lock()

    def moved(self) -> None:
        """Note that bytes have arrived."""
        self._moved_s = time.monotonic()

    def run(self, part: int, work: Callable[[], None]) -> None:
        """Run one part in the current thread; `wait` raises its exception."""
        try:
            work()
        except BaseException as error:
            self._end(part, error)
        else:
            self._end(part, None)

    def wait(self) -> None:
        """Wait for all parts; raises the exception of the first failed part.

        Raises `CheckpointError`, without waiting for the parts, if no byte arrives for
        `HANGING_READ_S`, or for `STOP_GRACE_S` after a stop.
        """
        begun_s, slow = time.monotonic(), False
        stopped_s: float | None = None
        while not self.over.wait(min(POLL_S, SLOW_READ_S, HANGING_READ_S)):
            now_s = time.monotonic()
            if not slow and now_s - begun_s >= SLOW_READ_S:
                slow = True
                _log.warning(
                    "%s is not read after %.0f s: the disk is slow or busy", self._what, SLOW_READ_S
                )
            if now_s - self._moved_s >= HANGING_READ_S:
                raise CheckpointError(
                    f"{self._what} cannot be read: the disk gave no byte for "
                    f"{HANGING_READ_S:.0f} s: {CHECK_DISK}"
                )
            if self._stopped is not None and self._stopped.is_set():
                stopped_s = now_s if stopped_s is None else stopped_s
                if now_s - stopped_s >= STOP_GRACE_S:
                    raise CheckpointError(
                        f"{self._what} is not read: it was stopped while the disk gave nothing"
                    )
        if self._failures:
            self._raise(self._failures.pop(min(self._failures)))

    def _end(self, part: int, failure: BaseException | None) -> None:
        with self._ending:
            if failure is not None:
                self._failures[part] = failure
            self._left -= 1
            if self._left == 0:
                self.over.set()

    def _raise(self, failure: BaseException) -> None:
        """Raise without keeping a reference, which would keep the traceback's frames and their
        buffers alive.
        """
        self._failures.clear()
        try:
            raise failure
        finally:
            del failure


def read_ranges(
    fd: int,
    ranges: Sequence[tuple[memoryview, int]],
    path: Path,
    what: str,
    seeking: threading.Lock,
) -> list[int]:
    """Fill each of `ranges`, (target, offset in the file); returns the bytes read of each, fewer
    only at the end of the file.

    Failed reads are retried after short, growing delays. Raises `CheckpointError` naming `path` and
    `what`, also for a hanging disk, and `OSError` if the system has no memory for a read. Ctrl-C
    works during the wait.
    """
    counts: list[int] = []
    reading = Reading(f"{path}: {what}", 1)

    def read() -> None:
        counts.extend(
            _read_fully(reading, fd, target, offset, f"{path}: reading {what}", seeking)
            for target, offset in ranges
        )

    threading.Thread(target=reading.run, args=(0, read), name="lowvram-read", daemon=True).start()
    reading.wait()
    return counts


def _read_fully(
    reading: Reading, fd: int, target: memoryview, offset: int, what: str, seeking: threading.Lock
) -> int:
    done = failures = 0
    while done < len(target):
        try:
            count = read_at(fd, target[done : done + READ_BYTES], offset + done, seeking)
            reading.moved()
            if count == 0:
                if os.fstat(fd).st_size <= offset + done:
                    break
                raise OSError(errno.EIO, "no byte came")
        except OSError as error:
            reading.moved()
            before_next_try(f"{what} at byte {offset + done}", error, failures)
            failures += 1
            continue
        done, failures = done + count, 0
    return done


def before_next_try(
    what: str, error: OSError, failures: int, pause: Callable[[float], object] = time.sleep
) -> None:
    """Log that `what` failed, and wait before the next try. failures: number of earlier failures.

    Raises `CheckpointError` after the last try, and `error` itself if it is about memory, so that
    the caller can free some.
    """
    if error.errno == errno.ENOMEM:
        raise error
    said = f"{what} failed: {error.strerror or error}"
    if failures == len(RETRY_DELAYS_S):
        raise CheckpointError(f"{said}, {failures + 1} times: {CHECK_DISK}") from error
    _log.warning("%s; trying again in %.2f s", said, RETRY_DELAYS_S[failures])
    pause(RETRY_DELAYS_S[failures])
