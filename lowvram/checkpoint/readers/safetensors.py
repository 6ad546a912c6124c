"""Read safetensors files one tensor at a time: the largest tensor bounds resident memory."""

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
# Smaller tensors are copied: a map keeps a file descriptor open.
SMALL_BYTES = 2**20
# Of copies: with less, a library may choose another kernel, which rounds differently.
ALIGNMENT = 64


class TensorFile:
    """An open safetensors file with a checked header.

    Methods may be called from several threads. The constructor raises `CheckpointError`.
    """

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
        """Close the file; tensors that were read stay valid."""
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
        """Return the tensor `name`, as a view of a private map that lives as long as the views.

        The tensor is copied instead if it is small, if its offset is not a multiple of its element
        size, or without `mapped`. A disk failure under a map kills the process (SIGBUS); a failing
        copy is retried and then raises. Writing to the result changes neither the file nor later
        reads. Raises `CheckpointError`.
        """
        info = self.header.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.header.path} has no tensor {quoted(name)}")
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
        """Copy rows of the tensor `name` into a tensor [len(rows), ...], reading only these rows.

        Raises `CheckpointError`.
        """
        info = self.header.tensors.get(name)
        if info is None or not info.shape or not all(0 <= row < info.shape[0] for row in rows):
            raise CheckpointError(
                f"{self.header.path}: tensor {quoted(name)}, or a requested row of it, is missing"
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
                    f"{self.header.path}: row {row} of {quoted(name)} is truncated: the file "
                    f"has changed since it was opened",
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
                f"{self.header.path}: expected {self.header.file_bytes} bytes, found {found}: the "
                f"file has changed since it was opened",
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
        """Read (target, offset) ranges; return the bytes read of each, fewer at the file's end."""
        return read_ranges(
            self._file.fileno(), places, self.header.path, quoted(name), self._seeking
        )

    def _mapped(self, info: TensorInfo) -> tuple[mmap.mmap, int]:
        begin = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # torch needs a writable buffer; writes to a private map do not reach the file.
        pages = mmap.mmap(
            self._file.fileno(), info.end - begin, access=mmap.ACCESS_COPY, offset=begin
        )
        return pages, info.start - begin
