"""Where a block's bytes come from: the store's file, read in parts by a few threads, past the page cache where the system allows."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from lowvram.disk import BINARY
from lowvram.errors import CheckpointError, InternalLimitError
from lowvram.memory.workspace import PAGE_BYTES

READ_THREADS = 4
PART_BYTES = 8 * 2**20  # a multiple of PAGE_BYTES
RETRY_DELAYS_S = (0.05, 0.25, 1.0)
SLOW_READ_S = 10.0
_log = logging.getLogger(__name__)


class DirectReadRefused(Exception):
    """The file system took O_DIRECT when the file was opened, and refuses it when it is read."""


class BlockFile:
    """Reads byte ranges of one store file straight into buffers; one open file, no mapping, so nothing counts as resident.

    `direct`: reads go past the page cache (O_DIRECT). Elsewhere they are buffered, and the cache is told to drop what was read.
    """

    def __init__(self, path: Path, ranges: list[tuple[int, int]], part_bytes: int = PART_BYTES) -> None:
        """ranges: (start, bytes) of each block in the file; part_bytes: what one thread reads at a time, a multiple of a page."""
        self.path = path
        self.ranges = ranges
        self._part_bytes = part_bytes
        self._one_block = threading.Lock()
        self._seek = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="lowvram-reader")  # starts no thread before its first part
        self._fd, self.direct = _open(path)

    def read_into(self, block: int, buffer: Tensor) -> Tensor:
        """The block as a view [nbytes] into `buffer`: [>= nbytes + READ_SLACK_BYTES] uint8 on the CPU.

        A part that fails or comes short is tried again after short growing delays. Raises `CheckpointError` naming file, block and byte.
        """
        with self._one_block:
            if self.direct:
                try:
                    return self._read(block, buffer)
                except DirectReadRefused:
                    os.close(self._fd)
                    self._fd, self.direct = os.open(self.path, os.O_RDONLY | BINARY), False
                    _log.info("%s: the file system reads through its cache only", self.path)
            return self._read(block, buffer)

    def stop(self) -> None:
        """Ends a read that is under way in another thread, at its next part or pause."""
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(cancel_futures=True)
        if self._fd >= 0:
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
                f"a buffer of {buffer.numel()} bytes has no room for block {block} of {nbytes} and the slack of its read"
            )
        target = buffer.numpy().data[at : at + length]
        parts = []
        for first in range(0, length, self._part_bytes):
            needed = min(self._part_bytes, lead + nbytes - first)
            if needed > 0:
                parts.append((block, target[first : first + self._part_bytes], start - lead + first, needed))
        self._read_parts(block, parts)
        if not self.direct and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice: where it is refused, the cache keeps what it likes
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the whole file: what was read ahead, too
        return buffer[at + lead : at + lead + nbytes]

    def _read_parts(self, block: int, parts: list[tuple[int, memoryview, int, int]]) -> None:
        if len(parts) == 1:
            self._read_part(*parts[0])
            return
        running: list[Future[None]] = [self._pool.submit(self._read_part, *part) for part in parts]
        if wait(running, SLOW_READ_S).not_done:
            _log.warning("%s: block %d is not read after %.0f s: the disk is slow or busy", self.path, block, SLOW_READ_S)
        wait(running)  # all of them, whatever fails: the buffer must not be written any more when this returns
        for part in running:
            part.result()

    def _read_part(self, block: int, target: memoryview, offset: int, needed: int) -> None:
        """Fills target[:needed] from `offset`; what lies behind `needed` only makes the read a whole number of pages."""
        page = PAGE_BYTES if self.direct else 1
        done = failures = 0
        while done < needed:
            if self._stopped.is_set():
                raise CheckpointError(f"{self.path}: reading block {block} was stopped at byte {offset + done}")
            problem = ""
            try:
                count = self._pread(target[done:], offset + done)
            except OSError as error:
                if self.direct and error.errno == errno.EINVAL:
                    raise DirectReadRefused from error
                count, problem = 0, error.strerror or str(error)
            if done + count >= needed or count >= page:
                done += count // page * page if done + count < needed else count
                continue
            self._pause(block, offset + done, problem or self._shortage(block, count), failures)
            failures += 1

    def _pread(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [target], offset)
        with self._seek:  # Windows: one position per open file
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(target))
        target[: len(data)] = data
        return len(data)

    def _shortage(self, block: int, count: int) -> str:
        """Why fewer bytes came than were asked for. Raises `CheckpointError` where the file ends too early."""
        start, nbytes = self.ranges[block]
        size = os.fstat(self._fd).st_size
        if size < start + nbytes:
            raise CheckpointError(
                f"{self.path}: block {block} ends at byte {size}, expected {start + nbytes}: truncated; quantize again or restore it"
            )
        return f"only {count} bytes came"

    def _pause(self, block: int, offset: int, problem: str, failures: int) -> None:
        where = f"{self.path}: reading block {block} at byte {offset} failed: {problem}"
        if failures == len(RETRY_DELAYS_S):
            raise CheckpointError(f"{where}, {failures + 1} times: check the disk and its cable, or copy the model to another one")
        _log.warning("%s; trying again in %.2f s", where, RETRY_DELAYS_S[failures])
        self._stopped.wait(RETRY_DELAYS_S[failures])


def _open(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it reads past the page cache."""
    direct = getattr(os, "O_DIRECT", 0) if hasattr(os, "preadv") else 0
    if direct:
        try:
            return os.open(path, os.O_RDONLY | direct), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, os.O_RDONLY | BINARY), False
