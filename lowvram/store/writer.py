"""Writes one safetensors file tensor by tensor, such that a final name exists only when complete
and a killed run can go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from lowvram.checkpoint.readers.safetensors import TORCH_DTYPES
from lowvram.errors import CheckpointError, ResumeError
from lowvram.files.io import BINARY, PARTIAL, check_room, output_error, sync_folder, write_all
from lowvram.store.journal import Journal
from lowvram.store.layout import ALIGNMENT_BYTES, StoredTensor

SYNC_BYTES = 256 * 2**20
CHUNK_BYTES = 16 * 2**20
JOURNAL = PARTIAL + ".journal"
_log = logging.getLogger(__name__)


def header_bytes(tensors: Sequence[StoredTensor], metadata: dict[str, str]) -> bytes:
    """A safetensors header in data order, metadata first, padded with spaces so that data starts on
    a multiple of 256.
    """
    entries: dict[str, object] = (
        {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    )
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


class StoreWriter:
    """Appends `tensors` in order to `path.partial`; `finish` gives it its name.

    `identity` says what the bytes depend on (recipe, source, version): a run can be resumed only
    with the same. The journal stays beside the finished file, so that resuming a longer run finds
    it done; whoever writes the manifest then removes it. Raises `DiskFullError` before it
    writes where there is too little room, `ResumeError` where it cannot go on.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[StoredTensor],
        metadata: dict[str, str],
        identity: dict[str, str],
        resume: bool,
        sync_bytes: int = SYNC_BYTES,
    ) -> None:
        self.path = path
        self.tensors = tuple(tensors)
        self.hashes: dict[str, str] = {}
        self._partial, self._journal_path = (
            path.with_name(path.name + PARTIAL),
            path.with_name(path.name + JOURNAL),
        )
        self._header = header_bytes(self.tensors, metadata)
        self._identity = identity | {"header": hashlib.sha256(self._header).hexdigest()}
        self._sync_bytes, self._unsynced_bytes = sync_bytes, 0
        self._pending: dict[str, str] = {}
        self._journal: Journal | None = None
        self._fd: int | None = None
        self._finished = False
        try:
            if not (resume and self._continue()):
                self._begin()
        except OSError as error:
            self.abort()
            raise output_error(path, error) from error
        except BaseException:
            self.abort()
            raise

    @property
    def header_sha256(self) -> str:
        """Hash of the file's bytes before its data."""
        return self._identity["header"]

    @property
    def remaining(self) -> list[StoredTensor]:
        """The tensors that are still to be written, in order."""
        return list(self.tensors[len(self.hashes) :])

    @property
    def written_bytes(self) -> int:
        """Bytes of tensor data written, those of an interrupted run included."""
        return sum(tensor.nbytes for tensor in self.tensors[: len(self.hashes)])

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def write(self, tensor: torch.Tensor) -> str:
        """Appends the next tensor and returns the sha256 of its bytes. Raises `CheckpointError`
        where it is not the one expected.
        """
        wanted = self._next(tensor)
        fd = self._open_fd()
        digest = hashlib.sha256()
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        try:
            data = flat.numpy().data
            for start in range(0, wanted.nbytes, CHUNK_BYTES):
                digest.update(data[start : start + CHUNK_BYTES])
                write_all(fd, data[start : start + CHUNK_BYTES])
            self.hashes[wanted.name] = self._pending[wanted.name] = digest.hexdigest()
            self._unsynced_bytes += wanted.nbytes
            if self._unsynced_bytes >= self._sync_bytes:
                self._sync()
        except OSError as error:
            raise output_error(self.path, error, "make room and go on with --resume") from error
        return digest.hexdigest()

    def finish(self) -> dict[str, str]:
        """Syncs, renames and returns name -> sha256. Raises `CheckpointError` where tensors are
        missing.
        """
        if self.remaining:
            raise CheckpointError(
                f"{self.path} lacks {len(self.remaining)} tensors, first {self.remaining[0].name}"
            )
        if not self._finished:
            try:
                self._sync()
                os.replace(self._partial, self.path)
                sync_folder(self.path.parent)
            except OSError as error:
                raise output_error(self.path, error, "make room and go on with --resume") from error
            self._finished = True
        self._close()
        return dict(self.hashes)

    def abort(self) -> None:
        """Leaves the partial file and its journal, with all that is known to be written, for a
        later resume.
        """
        if self._fd is not None:
            # what cannot be synced is not journalled, and will be written again
            with contextlib.suppress(OSError):
                self._sync()
        self._close()

    def _next(self, tensor: torch.Tensor) -> StoredTensor:
        remaining = self.remaining
        if not remaining:
            raise CheckpointError(
                f"{self.path}: all {len(self.tensors)} tensors are written already"
            )
        wanted = remaining[0]
        if tensor.dtype != TORCH_DTYPES[wanted.dtype] or tuple(tensor.shape) != wanted.shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(
                f"{self.path}: {wanted.name} must be {wanted.dtype} {list(wanted.shape)}, not "
                f"{found}"
            )
        return wanted

    def _open_fd(self) -> int:
        if self._fd is None:
            raise CheckpointError(f"{self.path}: the writer is closed")
        end = len(self._header) + self.written_bytes
        if os.lseek(self._fd, 0, os.SEEK_CUR) != end:  # bytes of a tensor whose write failed
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        return self._fd

    def _sync(self) -> None:
        if self._fd is not None and self._journal is not None:
            os.fsync(self._fd)
            self._journal.append(self._pending)
            self._pending, self._unsynced_bytes = {}, 0

    def _begin(self) -> None:
        for old in (self._partial, self._journal_path):
            if old.exists():
                _log.warning("removing %s, left by a run that did not finish", old)
                old.unlink()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_room(self.path, len(self._header) + sum(tensor.nbytes for tensor in self.tensors))
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        write_all(self._fd, self._header)
        os.fsync(self._fd)
        self._journal = Journal.create(self._journal_path, self._identity)
        sync_folder(self.path.parent)

    def _continue(self) -> bool:
        """Takes up what an earlier run left; False where that is nothing."""
        if not self._partial.exists() and not self.path.exists():
            return False
        self._journal = Journal.reopen(self._journal_path, self._identity)
        if self._journal is None:
            return False
        self._check_order(self._journal)
        if not self._partial.exists():
            return self._continue_finished(self._journal)
        self.hashes = dict(self._journal.hashes)
        self._fd = os.open(self._partial, os.O_RDWR | BINARY)
        end = len(self._header) + self.written_bytes
        size = os.fstat(self._fd).st_size
        if size < end or not self._has_header(self._fd):
            text = (
                f"{self._partial} does not hold the {end} bytes that its journal lists "
                f"({size} found)"
            )
            raise ResumeError(f"{text}: start again without --resume")
        check_room(self.path, sum(tensor.nbytes for tensor in self.remaining) - (size - end))
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        return True

    def _continue_finished(self, journal: Journal) -> bool:
        """The file has its name already: it is the journal's where header, length and number of
        tensors agree.
        """
        fd = os.open(self.path, os.O_RDONLY | BINARY)
        try:
            total = len(self._header) + sum(tensor.nbytes for tensor in self.tensors)
            done = (
                len(journal.hashes) == len(self.tensors)
                and os.fstat(fd).st_size == total
                and self._has_header(fd)
            )
        finally:
            os.close(fd)
        if done:
            self.hashes, self._finished = dict(journal.hashes), True
        else:
            self._close()
        return done

    def _has_header(self, fd: int) -> bool:
        os.lseek(fd, 0, os.SEEK_SET)
        return os.read(fd, len(self._header)) == self._header

    def _check_order(self, journal: Journal) -> None:
        if list(journal.hashes) != [tensor.name for tensor in self.tensors[: len(journal.hashes)]]:
            raise ResumeError(
                f"{journal.path} lists tensors that the file does not begin with: start again "
                f"without --resume"
            )

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
