"""Read and validate the header of an untrusted safetensors file."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lowvram.checkpoint.readers.files import LFS_POINTER, refuse_pointer
from lowvram.errors import CheckpointError, HeaderError
from lowvram.files.limits import HEADER_BYTES, check_values

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
SIZE_CAP = 2**63 - 1
# The rules of the format: what a `HeaderError` of each rule means.
RULES = {
    "file_too_short": "The file is shorter than the eight bytes of the header's length.",
    "empty_header": "The header's length is 0.",
    "too_long": "The header's length exceeds `HEADER_BYTES`.",
    "beyond_file": "The header's length exceeds the size of the file.",
    "encoding": "The header, or a name in it, is not UTF-8.",
    "json": "The header is not a JSON object.",
    "duplicate_key": "A key occurs twice in one JSON object.",
    "metadata": "`__metadata__` is not an object of strings.",
    "tensor_entry": "A tensor's entry is not an object of exactly dtype, shape and data_offsets.",
    "unknown_dtype": "The dtype is not one of `DTYPE_BYTES`.",
    "shape": "The shape is not a list of integers >= 0 (a bool is not an integer).",
    "offsets": "`data_offsets` is not two integers, 0 <= start <= end.",
    "size_overflow": "Shape times dtype, or an offset, exceeds 2^63-1 bytes.",
    "size_mismatch": "Shape times dtype differs from the length of `data_offsets`.",
    "overlap": "Two tensors share bytes.",
    "hole": "Bytes before or between tensors belong to no tensor.",
    "truncated_file": "The file ends before the end of its last tensor.",
    "trailing_bytes": "Bytes after the last tensor belong to no tensor.",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A validated header; `tensors` is in header order, which may differ from data order."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check every rule of the format.

    The tensors cover the file's data exactly. Raises `HeaderError` with the name of the broken
    rule, and `CheckpointError` for a file that cannot be read.
    """
    text, file_bytes = _read_text(path)
    data_start = 8 + len(text)
    entries = _parse(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in entries.items()}
    _check_tiling(path, tensors, data_start, file_bytes)
    return Header(path, tensors, metadata, data_start, file_bytes)


def quoted(name: str) -> str:
    """Format a name from an untrusted file for a message: escaped, at most 120 characters."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _read_text(path: Path) -> tuple[bytes, int]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(len(LFS_POINTER))
            refuse_pointer(path, prefix)
            prefix = prefix[:8]
            file.seek(len(prefix))
            length = _check_length(path, prefix, file_bytes)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) != length:
        raise HeaderError("truncated_file", f"{path}: the file shrank while its header was read")
    return text, file_bytes


def _check_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise HeaderError(
            "file_too_short",
            f"{path}: {file_bytes} bytes, but a safetensors file has at least 8: download or "
            f"convert it again",
        )
    length = int.from_bytes(prefix, "little")
    if length == 0:
        raise HeaderError(
            "empty_header", f"{path}: the header has length 0: not a safetensors file"
        )
    if length > HEADER_BYTES:
        raise HeaderError(
            "too_long",
            f"{path}: the header's length is {length} bytes, above the limit of "
            f"{HEADER_BYTES}: not a safetensors file",
        )
    if length > file_bytes - 8:
        raise HeaderError(
            "beyond_file",
            f"{path}: the header's length is {length} bytes, but only {file_bytes - 8} follow: "
            f"download it again",
        )
    return length


class _Duplicate(Exception):
    """Carries a repeated key out of the JSON parser."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Duplicate(key)
        result[key] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        check_values(text)
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise HeaderError(
            "encoding", f"{path}: the header is not UTF-8 at byte {8 + error.start}"
        ) from error
    except _Duplicate as error:
        raise HeaderError(
            "duplicate_key", f"{path}: the header has the key {quoted(str(error))} twice"
        ) from error
    except (ValueError, RecursionError) as error:
        raise HeaderError("json", f"{path}: the header is not JSON: {error}") from error
    if not isinstance(entries, dict) or text[:1] != b"{":
        raise HeaderError("json", f"{path}: the header is not a JSON object")
    for name in entries:
        _check_text(path, name)
    return entries


def _check_text(path: Path, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HeaderError(
            "encoding", f"{path}: the text {quoted(text)} in the header is not UTF-8"
        ) from error


def _metadata(path: Path, entry: Any) -> dict[str, str]:
    if entry is None:  # as the safetensors library reads it
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise HeaderError("metadata", f"{path}: __metadata__ is not an object of strings")
    for key, value in entry.items():
        _check_text(path, key)
        _check_text(path, value)
    return entry


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(
            "tensor_entry", f"{where}: the entry is not an object of dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise HeaderError(
            "unknown_dtype",
            f"{where}: unknown dtype {quoted(str(dtype))}; known are {', '.join(DTYPE_BYTES)}",
        )
    if not isinstance(shape, list) or not all(_is_integer(size) and size >= 0 for size in shape):
        raise HeaderError(
            "shape", f"{where}: the shape {quoted(str(shape))} is not a list of integers >= 0"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_integer(offset) for offset in offsets)
    ):
        raise HeaderError(
            "offsets", f"{where}: data_offsets {quoted(str(offsets))} is not two integers"
        )
    start, end = offsets
    if not 0 <= start <= end:
        raise HeaderError(
            "offsets", f"{where}: data_offsets {quoted(str(offsets))} is not 0 <= start <= end"
        )
    nbytes = _checked_bytes(where, dtype, shape, end)
    if nbytes != end - start:
        raise HeaderError(
            "size_mismatch",
            f"{where}: {dtype} {quoted(str(shape))} takes {nbytes} bytes, but data_offsets "
            f"span {end - start}",
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)


def _checked_bytes(where: str, dtype: str, shape: list[int], end: int) -> int:
    """Bytes of a tensor.

    The product of the non-zero sizes must also fit into 63 bits, because strides depend on it.
    """
    nbytes = DTYPE_BYTES[dtype]
    for size in shape:
        nbytes *= max(size, 1)
        if nbytes > SIZE_CAP:
            raise HeaderError(
                "size_overflow", f"{where}: {dtype} {quoted(str(shape))} exceeds 2^63-1 bytes"
            )
    if end > SIZE_CAP:
        raise HeaderError("size_overflow", f"{where}: the offset {quoted(str(end))} exceeds 2^63-1")
    return 0 if 0 in shape else nbytes


def _check_tiling(
    path: Path, tensors: dict[str, TensorInfo], data_start: int, file_bytes: int
) -> None:
    position = data_start
    for info in sorted(tensors.values(), key=lambda item: (item.start, item.end)):
        if info.start < position:
            raise HeaderError(
                "overlap",
                f"{path}: tensor {quoted(info.name)} overlaps the one before it by "
                f"{position - info.start} bytes",
            )
        if info.start > position:
            raise HeaderError(
                "hole",
                f"{path}: {info.start - position} bytes before tensor {quoted(info.name)} belong "
                f"to no tensor",
            )
        position = info.end
    if position > file_bytes:
        raise HeaderError(
            "truncated_file",
            f"{path}: expected {position} bytes, found {file_bytes}: download or convert the "
            f"file again",
        )
    if position < file_bytes:
        raise HeaderError(
            "trailing_bytes",
            f"{path}: expected {position} bytes, found {file_bytes}: bytes after the last tensor "
            f"belong to no tensor",
        )
