"""Where a block's bytes come from: the store's file, read in parts by a few threads, past the page
cache where the system allows.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from lowvram.errors import CheckpointError, InternalLimitError
from lowvram.files.io import BINARY, CHECK_DISK, STOP_GRACE_S, Reading, before_next_try, read_at
from lowvram.planner.workspace import PAGE_BYTES

READ_THREADS = 4
PART_BYTES = 8 * 2**20  # a multiple of PAGE_BYTES
_log = logging.getLogger(__name__)


class DirectReadRefused(Exception):
    """The file system took O_DIRECT when the file was opened, and refuses it when it is read."""


class Readers:
    """A few threads that run tasks in turn. Daemons, unlike those of `concurrent.futures`: a read
    that never returns may not keep the process from ending.
    """

    def __init__(self, count: int) -> None:
        """Starts no thread before its first task."""
        self._count = count
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, task: Callable[[], None]) -> None:
        """task: keeps its errors to itself."""
        if len(self._threads) < self._count:
            thread = threading.Thread(
                target=self._work, name=f"lowvram-reader-{len(self._threads)}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._tasks.put(task)

    def end(self) -> None:
        """Each thread ends after the tasks that it finds."""
        for _ in self._threads:
            self._tasks.put(None)

    def close(self, patience_s: float) -> bool:
        """Waits until the threads have ended; False where one is still at work after
        `patience_s`.
        """
        self.end()
        until_s = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it holds a buffer


class BlockFile:
    """Reads byte ranges of one store file straight into buffers; one open file, no mapping, so
    nothing counts as resident.

    `direct`: reads go past the page cache (O_DIRECT). Elsewhere they are buffered, and the cache is
    told to drop what was read.
    """

    def __init__(
        self, path: Path, ranges: list[tuple[int, int]], part_bytes: int = PART_BYTES
    ) -> None:
        """ranges: (start, bytes) of each block in the file; part_bytes: what one thread reads at a
        time, a multiple of a page.
        """
        self.path = path
        self.ranges = ranges
        self._part_bytes = part_bytes
        self._one_block = threading.Lock()
        self._seek = threading.Lock()
        self._stopped = threading.Event()
        self._hangs = False
        self._readers = Readers(READ_THREADS)
        weakref.finalize(self, self._readers.end)  # where nobody closes it
        self._fd, self.direct = _open(path)

    def read_into(self, block: int, buffer: Tensor) -> Tensor:
        """The block as a view [nbytes] into `buffer`: [>= nbytes + READ_SLACK_BYTES] uint8 on the
        CPU.

        A part that fails or comes short is tried again after short growing delays. Raises
        `CheckpointError` naming file, block and byte; the same where no byte comes for
        `HANGING_READ_S`, and such a read may still write into `buffer`. `OSError` is about memory
        alone.
        """
        with self._one_block:
            if self.direct:
                try:
                    return self._read(block, buffer)
                except DirectReadRefused:
                    os.close(self._fd)
                    self._fd, self.direct = -1, False
                    self._fd = _opened(self.path, os.O_RDONLY | BINARY)
                    _log.info("%s: the file system reads through its cache only", self.path)
            return self._read(block, buffer)

    def stop(self) -> None:
        """Ends a read that is under way in another thread, at its next part or pause,
        or after `STOP_GRACE_S`.
        """
        self._stopped.set()

    def close(self) -> None:
        """Leaves the file open to a read that does not come back."""
        self.stop()
        idle = self._readers.close(0.0 if self._hangs else STOP_GRACE_S)
        if idle and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, block: int, buffer: Tensor) -> Tensor:
        start, nbytes = self.ranges[block]
        page = PAGE_BYTES if self.direct else 1
        lead = start % page
        at = -buffer.data_ptr() % page
        length = -(-(lead + nbytes) // page) * page
        if at + length > buffer.numel():
            raise InternalLimitError(
                f"a buffer of {buffer.numel()} bytes has no room for block {block} of {nbytes} "
                f"and the slack of its read"
            )
        target = buffer.numpy().data[at : at + length]
        parts = []
        for first in range(0, length, self._part_bytes):
            needed = min(self._part_bytes, lead + nbytes - first)
            if needed > 0:
                parts.append(
                    (target[first : first + self._part_bytes], start - lead + first, needed)
                )
        self._read_parts(block, parts)
        if not self.direct and hasattr(os, "posix_fadvise"):
            # advice: where it is refused, the cache keeps what it likes
            with contextlib.suppress(OSError):
                # the whole file: what was read ahead, too
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return buffer[at + lead : at + lead + nbytes]

    def _read_parts(self, block: int, parts: list[tuple[memoryview, int, int]]) -> None:
        """parts: (target, offset, bytes needed)."""
        if self._hangs:
            raise CheckpointError(
                f"{self.path}: block {block} is not read: the disk hangs: {CHECK_DISK}"
            )
        reading = Reading(f"{self.path}: block {block}", len(parts), self._stopped)
        for number, part in enumerate(parts):
            self._readers.submit(
                partial(reading.run, number, partial(self._read_part, reading, block, *part))
            )
        try:
            reading.wait()
        finally:
            self._hangs = not reading.over.is_set()

    def _read_part(
        self, reading: Reading, block: int, target: memoryview, offset: int, needed: int
    ) -> None:
        """Fills target[:needed] from `offset`; what lies behind `needed` only makes the read a
        whole number of pages.
        """
        page = PAGE_BYTES if self.direct else 1
        done = failures = 0
        while done < needed:
            if self._stopped.is_set():
                raise CheckpointError(
                    f"{self.path}: reading block {block} was stopped at byte {offset + done}"
                )
            try:
                count = self._pread(target[done:], offset + done)
                reading.moved()
                if done + count < needed and count < page:
                    raise self._shortage(block, count)
            except OSError as error:
                reading.moved()
                if self.direct and error.errno == errno.EINVAL:
                    raise DirectReadRefused from error
                before_next_try(
                    f"{self.path}: reading block {block} at byte {offset + done}",
                    error,
                    failures,
                    self._stopped.wait,
                )
                failures += 1
                continue
            done += count // page * page if done + count < needed else count

    def _pread(self, target: memoryview, offset: int) -> int:
        return read_at(self._fd, target, offset, self._seek)

    def _shortage(self, block: int, count: int) -> OSError:
        """What it means that fewer bytes came than were asked for. Raises `CheckpointError` where
        the file ends too early.
        """
        start, nbytes = self.ranges[block]
        size = os.fstat(self._fd).st_size
        if size < start + nbytes:
            raise CheckpointError(
                f"{self.path}: block {block} ends at byte {size}, expected {start + nbytes}: "
                f"truncated; quantize again or restore it"
            )
        return OSError(errno.EIO, f"only {count} bytes came")


def _open(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it reads past the page cache. Raises as `_opened` does."""
    direct = getattr(os, "O_DIRECT", 0) if hasattr(os, "preadv") else 0
    if direct:
        try:
            return os.open(path, os.O_RDONLY | direct), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _cannot_open(path, error) from error
    return _opened(path, os.O_RDONLY | BINARY), False


def _opened(path: Path, flags: int) -> int:
    """Raises `CheckpointError`, and `OSError` where the system lacks memory."""
    try:
        return os.open(path, flags)
    except OSError as error:
        raise _cannot_open(path, error) from error


def _cannot_open(path: Path, error: OSError) -> Exception:
    if error.errno == errno.ENOMEM:
        return error
    return CheckpointError(
        f"{path} cannot be opened: {error.strerror or error}: check the disk, and that "
        f"the model is still there"
    )
