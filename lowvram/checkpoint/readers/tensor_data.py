"""Read the tensors of an open file by their byte ranges: whole, by rows, in pieces or sampled.

Nothing is mapped: a disk failure under a map kills the process (SIGBUS), while a failing read is
retried and then raises.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.errors import CheckpointError, HeaderError
from lowvram.files.read import read_ranges

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
# Of data that torch allocates: with less, a library may choose another kernel, which rounds
# differently.
ALIGNMENT = 64
SAMPLE_BYTES = 4096
Self = TypeVar("Self", bound="TensorData")


class Rows(Protocol):
    """A matrix that gives chunks of its rows: a tensor in memory, or one in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Rows and columns."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        """The rows of a slice without a step, [n, columns]."""


class FileRows:
    """The rows of a tensor in a file, read when they are asked for; a vector is one row."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: _ReadBytes) -> None:
        """read: reads (start, length) in bytes from the tensor's begin."""
        rows = shape[0] if len(shape) > 1 else 1
        self.shape = (rows, math.prod(shape) // rows if rows else math.prod(shape[1:]))
        self.dtype = dtype
        self._read = read

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        first, end, _ = rows.indices(self.shape[0])
        row_bytes = self.shape[1] * self.dtype.itemsize
        if end <= first or not row_bytes:
            return torch.empty(max(0, end - first), self.shape[1], dtype=self.dtype)
        data = self._read(first * row_bytes, (end - first) * row_bytes)
        return data.view(self.dtype).reshape(-1, self.shape[1])


_ReadBytes = Callable[[int, int], torch.Tensor]


class TensorData:
    """Tensors of an open file by name.

    Methods may be called from several threads. They raise `CheckpointError` naming file and tensor.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], file_bytes: int) -> None:
        """tensors: by name, with their byte ranges; file_bytes: the size of the file."""
        self.path, self.tensors = path, tensors
        self._file_bytes = file_bytes
        self._seeking = threading.Lock()
        try:
            self._file = open(path, "rb")  # noqa: SIM115  (closed by `close`)
        except OSError as error:
            raise self._unreadable(error) from error
        self.modified_ns = self._status().st_mtime_ns

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._file.close()

    def is_modified(self) -> bool:
        """Whether the file was written to since it was opened."""
        return self._status().st_mtime_ns != self.modified_ns

    def read(self, name: str) -> torch.Tensor:
        """Copy the tensor `name`. Its data begin at a multiple of `ALIGNMENT` bytes."""
        info = self._info(name)
        dtype = TORCH_DTYPES[info.dtype]
        return self._bytes(info, 0, info.nbytes).view(dtype).reshape(info.shape)

    def rows(self, name: str) -> Rows:
        """The tensor `name` as a matrix whose rows are read when they are asked for."""
        info = self._info(name)
        return FileRows(
            info.shape,
            TORCH_DTYPES[info.dtype],
            lambda start, length: self._bytes(info, start, length),
        )

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Copy rows of the tensor `name` into a tensor [len(rows), ...], reading only these."""
        info = self.tensors.get(name)
        if info is None or not info.shape or not all(0 <= row < info.shape[0] for row in rows):
            raise CheckpointError(
                f"{self.path}: tensor {quoted(name)}, or a requested row of it, is missing"
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
                    f"{self.path}: row {row} of {quoted(name)} is truncated: the file has "
                    f"changed since it was opened",
                )
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).reshape(
            len(rows), *info.shape[1:]
        )

    def pieces(self, name: str, piece_bytes: int) -> Iterator[memoryview]:
        """The data of the tensor `name` in file order, at most `piece_bytes` at a time."""
        info = self._info(name)
        for start in range(0, info.nbytes, piece_bytes):
            piece = self._bytes(info, start, min(piece_bytes, info.nbytes - start))
            data: memoryview = piece.numpy().data
            yield data

    def sample(self, name: str) -> bytes:
        """Data from the begin, the middle and the end of the tensor `name`, which tell whether it
        was replaced.
        """
        info = self._info(name)
        size = min(SAMPLE_BYTES, info.nbytes)
        starts = sorted({0, (info.nbytes - size) // 2, info.nbytes - size})
        buffer = bytearray(size * len(starts))
        self._fill(
            [
                (memoryview(buffer)[number * size : (number + 1) * size], info.start + start)
                for number, start in enumerate(starts)
            ],
            name,
        )
        return bytes(buffer)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {quoted(name)}")
        return info

    def _bytes(self, info: TensorInfo, start: int, length: int) -> torch.Tensor:
        """Data of a tensor, [length] uint8; start: in bytes from the tensor's begin."""
        if length == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._status().st_size != self._file_bytes:
            raise HeaderError(
                "truncated_file",
                f"{self.path}: expected {self._file_bytes} bytes, found "
                f"{self._status().st_size}: the file has changed since it was opened",
            )
        # torch aligns what it allocates, and its memory is counted against the RAM budget
        data = torch.empty(length, dtype=torch.uint8)
        (count,) = self._fill([(data.numpy().data, info.start + start)], info.name)
        if count != length:
            raise HeaderError(
                "truncated_file",
                f"{self.path}: expected {length} bytes of {quoted(info.name)}, found {count}",
            )
        return data

    def _status(self) -> os.stat_result:
        try:
            return os.fstat(self._file.fileno())
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot read {self.path}: {error.strerror or error}")

    def _fill(self, places: Sequence[tuple[memoryview, int]], name: str) -> list[int]:
        """Read (target, offset) ranges; return the bytes read of each, fewer at the file's end."""
        return read_ranges(self._file.fileno(), places, self.path, quoted(name), self._seeking)
