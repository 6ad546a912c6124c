"""Reads the tensors of a safetensors file one at a time, so that resident memory is bounded by the
largest of them.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from lowvram.checkpoint.readers.safetensors_header import (
    Header,
    TensorInfo,
    quoted,
    read_header,
)
from lowvram.errors import CheckpointError, HeaderError
from lowvram.files.io import read_ranges

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
# below this a copy is cheaper than a map, which costs a file descriptor while it lives
SMALL_BYTES = 2**20
ALIGNMENT = 64  # of copies: a library may take another kernel for less, with other roundings


class TensorFile:
    """A safetensors file whose header was checked. `read` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        self.header: Header = read_header(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115  (closed by `close`)
        except OSError as error:
            raise self._unreadable(error) from error
        self._seeking = threading.Lock()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Tensors that were read stay valid."""
        self._file.close()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The header's tensors by name."""
        return self.header.tensors

    @property
    def metadata(self) -> dict[str, str]:
        """The header's `__metadata__`."""
        return self.header.metadata

    def read(self, name: str, mapped: bool = True) -> torch.Tensor:
        """The tensor `name`: a view of a private map of its own pages, unmapped when the last view
        dies.

        Small tensors, those that start at an odd multiple of their element and, without `mapped`,
        all are copied. A disk that fails under a map ends the process (SIGBUS); a copy is read
        again, and then named in an error. Writing into the result changes neither the file nor
        later reads. Raises `CheckpointError`.
        """
        info = self.header.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.header.path} holds no tensor {quoted(name)}")
        dtype = TORCH_DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        self._check_size()
        copied = not mapped or info.nbytes < SMALL_BYTES or info.start % dtype.itemsize
        buffer, offset = self._copied(info) if copied else self._mapped(info)
        return torch.frombuffer(
            buffer, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=offset
        ).reshape(info.shape)

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Rows [len(rows), ...] of the tensor `name`, copied: of a large table only what is asked
        for is read, or counts as memory.

        Raises `CheckpointError`.
        """
        info = self.header.tensors.get(name)
        if info is None or not info.shape or not all(0 <= row < info.shape[0] for row in rows):
            raise CheckpointError(
                f"{self.header.path}: tensor {quoted(name)} with the rows asked for is missing"
            )
        row_bytes = info.nbytes // info.shape[0]
        buffer = bytearray(row_bytes * len(rows))
        view = memoryview(buffer)
        places = [
            (view[number * row_bytes : (number + 1) * row_bytes], info.start + row * row_bytes)
            for number, row in enumerate(rows)
        ]
        for row, count in zip(rows, self._fill(places, name), strict=True):
            if count != row_bytes:
                raise HeaderError(
                    "truncated_file",
                    f"{self.header.path}: row {row} of {quoted(name)} is cut off: it changed "
                    f"meanwhile",
                )
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(
            len(rows), *info.shape[1:]
        )

    def _check_size(self) -> None:
        try:
            found = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        if found != self.header.file_bytes:
            raise HeaderError(
                "truncated_file",
                f"{self.header.path}: expected {self.header.file_bytes} bytes, found {found}: it "
                f"changed meanwhile",
            )

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot read {self.header.path}: {error.strerror or error}")

    def _copied(self, info: TensorInfo) -> tuple[bytearray, int]:
        buffer = bytearray(info.nbytes + ALIGNMENT)
        start = -torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % ALIGNMENT
        (count,) = self._fill(
            [(memoryview(buffer)[start : start + info.nbytes], info.start)], info.name
        )
        if count != info.nbytes:
            raise HeaderError(
                "truncated_file",
                f"{self.header.path}: expected {info.nbytes} bytes of {quoted(info.name)}, found "
                f"{count}",
            )
        return buffer, start

    def _fill(self, places: Sequence[tuple[memoryview, int]], name: str) -> list[int]:
        """places: (target, offset); returns how many bytes came: fewer than wanted where the file
        ends.
        """
        return read_ranges(
            self._file.fileno(), places, self.header.path, quoted(name), self._seeking
        )

    def _mapped(self, info: TensorInfo) -> tuple[mmap.mmap, int]:
        begin = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # A private map is writable, as torch wants its buffers, yet no write reaches the file.
        pages = mmap.mmap(
            self._file.fileno(), info.end - begin, access=mmap.ACCESS_COPY, offset=begin
        )
        return pages, info.start - begin
