"""Writer of one safetensors file, tensor by tensor: resumable, renamed to its final name when
complete.
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

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.errors import CheckpointError, ResumeError
from lowvram.files.write import BINARY, PARTIAL, check_room, output_error, sync_folder, write_all
from lowvram.store.journal import Journal
from lowvram.store.layout import ALIGNMENT_BYTES, StoredTensor

SYNC_BYTES = 256 * 2**20
CHUNK_BYTES = 16 * 2**20
JOURNAL = PARTIAL + ".journal"
READ_BYTES = 8 * 2**20  # read at once where a resumed file is checked
_log = logging.getLogger(__name__)


def header_bytes(tensors: Sequence[StoredTensor], metadata: dict[str, str]) -> bytes:
    """Build a safetensors header: metadata first, tensors in data order, padded with spaces so that
    the data starts at a multiple of `ALIGNMENT_BYTES`.
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
    """Appends `tensors` in order to `path.partial`; `finish` renames the file to `path`.

    identity: everything that the bytes depend on (recipe, source, version); a run is resumed only
    with an equal identity. hashes: sha256 (hex) of every tensor written so far.
    resume: continue the partial file, if there is one; otherwise it is overwritten.
    sync_bytes: data written between two syncs.

    The journal remains beside the finished file, so that a resumed run over several files finds
    this one complete; the code that writes the manifest removes it. Raises `DiskFullError` before
    writing if there is too little space, `ResumeError` if the run cannot be resumed, `OutputError`
    if the file cannot be written.
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
        """Hash (hex) of the file's bytes before the tensor data."""
        return self._identity["header"]

    @property
    def remaining(self) -> list[StoredTensor]:
        """Tensors that are not written yet, in order."""
        return list(self.tensors[len(self.hashes) :])

    @property
    def written_bytes(self) -> int:
        """Bytes of tensor data written, including those of a resumed run."""
        return sum(tensor.nbytes for tensor in self.tensors[: len(self.hashes)])

    def __enter__(self) -> StoreWriter:
        """Return the writer; leaving the context aborts unless it is finished."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def write(self, tensor: torch.Tensor) -> str:
        """Append the next tensor and return the sha256 (hex) of its bytes.

        Raises `CheckpointError` if its dtype or shape is not the expected one, and `OutputError`.
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
            raise output_error(self.path, error, "make room and continue with --resume") from error
        return digest.hexdigest()

    def finish(self) -> dict[str, str]:
        """Sync the file, rename it and return the sha256 (hex) of each tensor.

        Raises `CheckpointError` if tensors are missing, and `OutputError`.
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
                raise output_error(
                    self.path, error, "make room and continue with --resume"
                ) from error
            self._finished = True
        self._close()
        return dict(self.hashes)

    def abort(self) -> None:
        """Close the partial file and its journal for a later resume, after a last sync."""
        if self._fd is not None:
            # Data that cannot be synced is not journalled, so a resumed run writes it again.
            with contextlib.suppress(OSError):
                self._sync()
        self._close()

    def _next(self, tensor: torch.Tensor) -> StoredTensor:
        """The next entry of the header, which `tensor` must match."""
        remaining = self.remaining
        if not remaining:
            raise CheckpointError(
                f"{self.path}: all {len(self.tensors)} tensors are written already"
            )
        wanted = remaining[0]
        if tensor.dtype != TORCH_DTYPES[wanted.dtype] or tuple(tensor.shape) != wanted.shape:
            raise CheckpointError(
                f"{self.path}: {wanted.name} must be {wanted.dtype} {list(wanted.shape)}, not "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        return wanted

    def _open_fd(self) -> int:
        """The file descriptor, positioned after the last complete tensor."""
        if self._fd is None:
            raise CheckpointError(f"{self.path}: the writer is closed")
        end = len(self._header) + self.written_bytes
        if os.lseek(self._fd, 0, os.SEEK_CUR) != end:  # a write of a tensor failed halfway
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        return self._fd

    def _sync(self) -> None:
        """Sync the data, then add its tensors to the journal."""
        if self._fd is not None and self._journal is not None:
            os.fsync(self._fd)
            self._journal.append(self._pending)
            self._pending, self._unsynced_bytes = {}, 0

    def _begin(self) -> None:
        """Start a new partial file and journal."""
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
        """Continue the file of an earlier run; False if there is none."""
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
            raise ResumeError(
                f"{self._partial} does not contain the {end} bytes that its journal lists "
                f"({size} found): start again without --resume"
            )
        if (damaged := self._damaged(self._fd)) is not None:
            raise ResumeError(
                f"{self._partial}: tensor {damaged} is not as it was written: start again without "
                f"--resume"
            )
        check_room(self.path, sum(tensor.nbytes for tensor in self.remaining) - (size - end))
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        return True

    def _continue_finished(self, journal: Journal) -> bool:
        """Accept a file that already has its final name, if header, length and the hashes of all
        tensors match the journal.
        """
        fd = os.open(self.path, os.O_RDONLY | BINARY)
        try:
            total = len(self._header) + sum(tensor.nbytes for tensor in self.tensors)
            complete = (
                len(journal.hashes) == len(self.tensors)
                and os.fstat(fd).st_size == total
                and self._has_header(fd)
            )
            if complete:
                self.hashes = dict(journal.hashes)
                if (damaged := self._damaged(fd)) is not None:
                    text = "%s: tensor %s is not as it was written: the file is made again"
                    _log.warning(text, self.path, damaged)
                    complete, self.hashes = False, {}
        finally:
            os.close(fd)
        if complete:
            self._finished = True
        else:
            self._close()
        return complete

    def _damaged(self, fd: int) -> str | None:
        """The first tensor in the file whose bytes do not have the hash in `hashes`."""
        os.lseek(fd, len(self._header), os.SEEK_SET)
        for tensor in self.tensors[: len(self.hashes)]:
            digest, left = hashlib.sha256(), tensor.nbytes
            while left and (data := os.read(fd, min(left, READ_BYTES))):
                digest.update(data)
                left -= len(data)
            if digest.hexdigest() != self.hashes[tensor.name]:
                return tensor.name
        return None

    def _has_header(self, fd: int) -> bool:
        os.lseek(fd, 0, os.SEEK_SET)
        return os.read(fd, len(self._header)) == self._header

    def _check_order(self, journal: Journal) -> None:
        if list(journal.hashes) != [tensor.name for tensor in self.tensors[: len(journal.hashes)]]:
            raise ResumeError(
                f"{journal.path} lists other tensors than the file begins with: start again "
                f"without --resume"
            )

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
