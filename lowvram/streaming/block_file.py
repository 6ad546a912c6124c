"""Read blocks from a store file in parallel parts, bypassing the page cache where possible."""

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
from lowvram.files.read import CHECK_DISK, STOP_GRACE_S, Reading, before_next_try, read_at
from lowvram.files.write import BINARY
from lowvram.planner.workspace import PAGE_BYTES

READ_THREADS = 4
PART_BYTES = 8 * 2**20  # a multiple of PAGE_BYTES
_log = logging.getLogger(__name__)


class DirectReadRefused(Exception):
    """The file system accepts O_DIRECT when opening a file but not when reading it."""


class Readers:
    """A pool of daemon threads.

    Unlike with `concurrent.futures`, a read that never returns does not block the end of the
    process. Threads start with the first tasks.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task, which must not raise."""
        if len(self._threads) < self._count:
            thread = threading.Thread(
                target=self._work, name=f"lowvram-reader-{len(self._threads)}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._tasks.put(task)

    def end(self) -> None:
        """Let the threads end after the queued tasks; does not wait."""
        for _ in self._threads:
            self._tasks.put(None)

    def close(self, patience_s: float) -> bool:
        """End the threads and wait for them; False if one still runs after `patience_s` seconds."""
        self.end()
        until_s = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it references a buffer


class BlockFile:
    """Reads the blocks of one store file into buffers, without memory-mapping the file.

    direct: reads bypass the page cache (O_DIRECT). Otherwise they are buffered, and the cache is
    advised to drop the data. modified: the file is not as it was when its header was read.
    """

    modified = False

    def __init__(
        self,
        path: Path,
        ranges: list[tuple[int, int]],
        part_bytes: int = PART_BYTES,
        modified_ns: int | None = None,
    ) -> None:
        """Open the file.

        ranges: (start, bytes) of each block; part_bytes: size of one thread's read, a multiple of
        `PAGE_BYTES`; modified_ns: the file's time of modification when its header was read.
        Raises `CheckpointError`, and `OSError` when the system is out of memory.
        """
        self.path = path
        self.ranges = ranges
        self._part_bytes = part_bytes
        self._one_block = threading.Lock()
        self._seek = threading.Lock()
        self._stopped = threading.Event()
        self._hangs = False
        self._readers = Readers(READ_THREADS)
        weakref.finalize(self, self._readers.end)  # if the file is not closed
        self._fd, self.direct = _open(path)
        self._modified_ns = modified_ns
        self._note_changes()

    def read_into(self, block: int, buffer: Tensor) -> Tensor:
        """Read a block; returns a view [nbytes] into `buffer`.

        buffer: [>= nbytes + READ_SLACK_BYTES] uint8 on the CPU.
        Failed and short reads are retried after short, growing delays. Raises `CheckpointError`,
        naming file, block and byte, also when no data arrive for `HANGING_READ_S`; such a read may
        still write to `buffer` later. Raises `OSError` only when the system is out of memory.
        """
        with self._one_block:
            if self.direct:
                try:
                    return self._read(block, buffer)
                except DirectReadRefused:
                    os.close(self._fd)
                    self._fd, self.direct = -1, False
                    self._fd = _opened(self.path, os.O_RDONLY | BINARY)
                    _log.info("%s: the file system does not support direct reads", self.path)
            return self._read(block, buffer)

    def _note_changes(self) -> None:
        with contextlib.suppress(OSError):  # the read itself reports what fails
            found_ns = os.fstat(self._fd).st_mtime_ns
            self.modified |= self._modified_ns not in (None, found_ns)

    def stop(self) -> None:
        """Stop a read in another thread at its next part or pause, or after `STOP_GRACE_S`."""
        self._stopped.set()

    def close(self) -> None:
        """Stop reading and close the file; it stays open if a read hangs."""
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
                f"a buffer of {buffer.numel()} bytes is too small for block {block} of {nbytes} "
                f"and page alignment"
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
        self._note_changes()
        if not self.direct and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only advice
                # for the whole file, to include data that were read ahead
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return buffer[at + lead : at + lead + nbytes]

    def _read_parts(self, block: int, parts: list[tuple[memoryview, int, int]]) -> None:
        """parts: (target, offset, bytes needed)."""
        if self._hangs:
            raise CheckpointError(
                f"{self.path}: block {block} cannot be read: the disk hangs: {CHECK_DISK}"
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
        """Read target[:needed] from `offset`; the rest of `target` pads the read to whole pages."""
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
        """The error of a short read. Raises `CheckpointError` when the file is truncated."""
        start, nbytes = self.ranges[block]
        size = os.fstat(self._fd).st_size
        if size < start + nbytes:
            raise CheckpointError(
                f"{self.path}: block {block} ends at byte {size}, expected {start + nbytes}: "
                f"truncated; quantize again or restore it"
            )
        return OSError(errno.EIO, f"only {count} bytes were read")


def _open(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it bypasses the page cache. Raises as `_opened` does."""
    direct = getattr(os, "O_DIRECT", 0) if hasattr(os, "preadv") else 0
    if direct:
        try:
            return os.open(path, os.O_RDONLY | direct), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _cannot_open(path, error) from error
    return _opened(path, os.O_RDONLY | BINARY), False


def _opened(path: Path, flags: int) -> int:
    """Raises `CheckpointError`, and `OSError` when the system is out of memory."""
    try:
        return os.open(path, flags)
    except OSError as error:
        raise _cannot_open(path, error) from error


def _cannot_open(path: Path, error: OSError) -> Exception:
    if error.errno == errno.ENOMEM:
        return error
    return CheckpointError(
        f"cannot open {path}: {error.strerror or error}: check the disk, and that the model still "
        f"exists"
    )
