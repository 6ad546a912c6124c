"""Promise 10: every malformed kind of header raises its own error, without allocating what it
claims.
"""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowvram.checkpoint.readers import safetensors_header as header
from lowvram.checkpoint.readers.safetensors_header import read_header
from lowvram.errors import CheckpointError, HeaderError
from lowvram.files.limits import HEADER_BYTES

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_with(path: Path, entries: Any, data_bytes: int = 8) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return {"a": F32_PAIR | changes}


def pair(first: list[int], second: list[int]) -> dict[str, Any]:
    return {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in zip("ab", (first, second), strict=True)
    }


MALFORMED: dict[str, tuple[Any, str]] = {
    "empty file": (b"RAW", "file_too_short"),
    "7 bytes": (b"RAW1234567", "file_too_short"),
    "length 0": (b"RAW" + bytes(8), "empty_header"),
    "over the cap": (b"RAW" + (2**62).to_bytes(8, "little") + b"{}", "too_long"),
    "just over the cap": (
        b"RAW" + (HEADER_BYTES + 1).to_bytes(8, "little"),
        "too_long",
    ),
    "over the file": (b"RAW" + (3).to_bytes(8, "little") + b"{}", "beyond_file"),
    "claims the cap": (
        b"RAW" + HEADER_BYTES.to_bytes(8, "little") + b"{}",
        "beyond_file",
    ),
    "not UTF-8": (b'{"\xff":1}', "encoding"),
    "lone surrogate in a name": (b'{"\\ud800":1}', "encoding"),
    "lone surrogate in metadata": (b'{"__metadata__":{"a":"\\ud800"}}', "encoding"),
    "not JSON": (b"{nonsense}", "json"),
    "padded with NUL": (b"{}\x00\x00", "json"),
    "NaN": (b'{"a":NaN}', "json"),
    "a list": (b"[]", "json"),
    "space before the object": (b" {}", "json"),
    "nested too deeply": (b'{"a":' * 100_000, "json"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "json"),
    "duplicate tensor": (b'{"a":1,"a":2}', "duplicate_key"),
    "duplicate key in a tensor": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "duplicate_key",
    ),
    "metadata is a list": ({"__metadata__": []}, "metadata"),
    "metadata holds a number": ({"__metadata__": {"a": 1}}, "metadata"),
    "entry is a number": ({"a": 1}, "tensor_entry"),
    "entry lacks the dtype": (
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        "tensor_entry",
    ),
    "entry has one key more": (changed(stride=[1]), "tensor_entry"),
    "unknown dtype": (changed(dtype="F33"), "unknown_dtype"),
    "dtype is a list": (changed(dtype=["F32"]), "unknown_dtype"),
    "shape is a number": (changed(shape=2), "shape"),
    "shape holds a bool": (changed(shape=[2, True]), "shape"),
    "shape holds a negative": (changed(shape=[-2]), "shape"),
    "shape holds a float": (changed(shape=[2.0]), "shape"),
    "shape holds a text": (changed(shape=["2"]), "shape"),
    "one offset": (changed(data_offsets=[8]), "offsets"),
    "an offset is a bool": (changed(data_offsets=[False, 8]), "offsets"),
    "an offset is a float": (changed(data_offsets=[0, 8.0]), "offsets"),
    "a negative offset": (changed(data_offsets=[-8, 0]), "offsets"),
    "offsets backwards": (changed(data_offsets=[8, 0]), "offsets"),
    "size overflow": (changed(shape=[2**62, 2]), "size_overflow"),
    "size overflow that wraps to 8": (changed(shape=[2**63 + 1, 2]), "size_overflow"),
    "size overflow beside a zero": (
        changed(shape=[0, 2**40, 2**40], data_offsets=[0, 0]),
        "size_overflow",
    ),
    "offset overflow": (changed(data_offsets=[2**64, 2**64 + 8]), "size_overflow"),
    "size mismatch": (changed(shape=[3]), "size_mismatch"),
    "overlap": (pair([0, 5], [4, 8]), "overlap"),
    "the same bytes twice": (pair([0, 8], [0, 8]), "overlap"),
    "hole": (pair([0, 3], [4, 8]), "hole"),
    "hole at the start": (pair([1, 3], [3, 8]), "hole"),
    "trailing bytes": (pair([0, 3], [3, 7]), "trailing_bytes"),
    "no tensors but bytes": ({}, "trailing_bytes"),
    "truncated": (pair([0, 3], [3, 9]), "truncated_file"),
    "claims 2^60 bytes": (
        changed(shape=[2**58], data_offsets=[0, 2**60]),
        "truncated_file",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_p10_malformed_kind_has_its_own_error(kind: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[kind]
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes) and content.startswith(b"RAW"):
        path.write_bytes(content[3:])
    else:
        file_with(path, content)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError) as caught:
            read_header(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.rule == expected
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))
    assert peak_bytes < 2**24 + 40 * path.stat().st_size


def test_p10_each_kind_is_told_apart() -> None:
    kinds = {kind for _, kind in MALFORMED.values()}
    assert kinds == set(header.RULES)


def test_p10_tiny_file_cut_at_every_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(
        {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int8)},
        whole,
        metadata={"key": "value"},
    )
    content = whole.read_bytes()
    read_header(whole)
    cut = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(HeaderError):
            read_header(cut)


def test_truncated_file_names_expected_and_actual_bytes(tmp_path: Path) -> None:
    path = file_with(tmp_path / "cut.safetensors", {"a": F32_PAIR}, data_bytes=5)
    size = path.stat().st_size
    with pytest.raises(HeaderError, match=f"expected {size + 3} bytes, found {size}") as caught:
        read_header(path)
    assert caught.value.rule == "truncated_file"


def test_header_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    tensors = {
        "w": torch.randn(3, 5),
        "scalar": torch.tensor(2.0),
        "none": torch.empty(0, 4),
        "half": torch.ones(7).half(),
    }
    save_file(tensors, path, metadata={"b": "2", "a": "1"})
    found = read_header(path)
    assert found.metadata == {"b": "2", "a": "1"}
    assert found.file_bytes == path.stat().st_size
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    assert all(
        info.nbytes == tensors[name].nbytes and info.start >= found.data_start
        for name, info in found.tensors.items()
    )


def test_header_keeps_its_own_order_where_data_order_differs(tmp_path: Path) -> None:
    entries = dict(reversed(pair([0, 3], [3, 8]).items()))
    assert list(read_header(file_with(tmp_path / "x.safetensors", entries)).tensors) == ["b", "a"]


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            read_header(path)
        except CheckpointError as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert len(caught) == 1, "the read hangs or passes"
    assert str(path) in str(caught[0])
