"""Promise 11: random valid files round-trip; random damage raises only `LowvramError`, soon and
within bounded memory.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import DTYPE_BYTES, read_header
from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.checkpoint.source import open_source
from lowvram.errors import LowvramError
from lowvram.store.layout import StoredTensor
from lowvram.store.manifest import MANIFEST_NAME
from lowvram.store.reader import open_store
from lowvram.store.writer import StoreWriter
from tests.helpers.checkpoints import tiny_config, write_official, write_store

QUICK = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
CODES = st.sampled_from(sorted(set(DTYPE_BYTES) - {"BOOL"}))
STORED = ("F32", "BF16", "I8", "U8", "F8_E4M3")
VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([2**63, -1, 2**31, "F32", "I8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


def filled(code: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    dtype = TORCH_DTYPES[code]
    count = int(torch.Size(shape).numel())
    raw = torch.randint(
        0,
        256,
        (count * dtype.itemsize,),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )
    return raw.view(dtype).reshape(shape)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def read_all(path: Path) -> None:
    text = ""
    try:
        with TensorFile(path) as file:
            for name in file.header.tensors:
                file.read(name).reshape(-1).view(torch.uint8).sum()
    except LowvramError as error:
        text = str(error)
    assert len(text.encode("utf-8").splitlines()) <= 1


def survives(path: Path) -> None:
    """Reading every tensor works or raises a `LowvramError`, within 1 s of this thread's time and
    256 MB.
    """
    began = time.thread_time()
    read_all(path)
    assert time.thread_time() - began < 1
    tracemalloc.start()
    try:
        read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 256 * 10**6
    finally:
        tracemalloc.stop()


@QUICK
@given(
    st.dictionaries(NAMES, st.tuples(CODES, SHAPES), max_size=6),
    st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_p11_valid_file_of_the_safetensors_library_is_read(
    tmp_path: Path, kinds: dict[str, Any], metadata: dict[str, str]
) -> None:
    tensors = {
        name: filled(code, shape, index)
        for index, (name, (code, shape)) in enumerate(kinds.items())
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata or None))  # for {} and {} the library writes no JSON
    with TensorFile(path) as file:
        assert file.header.metadata == metadata
        assert set(file.header.tensors) == set(tensors)
        assert all(same(file.read(name), tensor) for name, tensor in tensors.items())


@QUICK
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(STORED), SHAPES), max_size=6),
    st.dictionaries(NAMES, NAMES),
    st.booleans(),
)
def test_p11_written_file_is_read_by_the_safetensors_library(
    tmp_path: Path, kinds: dict[str, Any], metadata: dict[str, str], cut: bool
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        name: filled(code, shape, index)
        for index, (name, (code, shape)) in enumerate(kinds.items())
    }
    plan = [StoredTensor(name, code, shape, "copy", "") for name, (code, shape) in kinds.items()]
    if cut:
        with StoreWriter(path, plan, metadata, {}, resume=False) as writer:
            for item in plan[: len(plan) // 2]:
                writer.write(tensors[item.name])
    with StoreWriter(path, plan, metadata, {}, resume=cut) as writer:
        for item in writer.remaining:
            writer.write(tensors[item.name])
        writer.finish()
    header = read_header(path)
    assert header.metadata == metadata
    assert list(header.tensors) == list(kinds)
    assert header.data_start % 256 == 0
    loaded = load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


@QUICK
@given(st.data())
def test_p11_random_damage_raises_only_lowvram_errors(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(
        save({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.int8)}, {"key": "value"})
    )
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "number"]))
        if kind == "flip" and position < len(content):
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[position:]
        elif kind == "insert":
            content[position:position] = data.draw(st.binary(max_size=8))
        elif kind == "remove":
            del content[position : position + data.draw(st.integers(1, 40))]
        else:
            content[:8] = (
                data.draw(st.integers(0, 2**64 - 1) | st.integers(0, len(content)))
                .to_bytes(8, "little")
                .ljust(len(content[:8]))
            )
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    survives(path)


@QUICK
@given(
    st.dictionaries(st.sampled_from(["__metadata__", "a", "b", ""]), VALUES, max_size=4) | VALUES,
    st.integers(0, 64),
)
def test_p11_any_json_as_a_header_raises_only_lowvram_errors(
    tmp_path: Path, entries: Any, data_bytes: int
) -> None:
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    survives(path)


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "F4", ""]),
        "shape": st.lists(
            st.integers(0, 4) | st.sampled_from([2**62, 2**63, 2**64, True]), max_size=70
        ),
        "data_offsets": st.lists(
            st.integers(-1, 70) | st.sampled_from([2**63, 2**64]), min_size=1, max_size=3
        ),
    }
)


@QUICK
@given(st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3), st.integers(0, 64))
def test_p11_plausible_entries_raise_only_lowvram_errors(
    tmp_path: Path, entries: Any, data_bytes: int
) -> None:
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    survives(path)


def test_p11_large_hostile_header_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for text in (
        b'{"a":' + b"[" * 10**6,
        b'{"a":"' + b"x" * 10**6 + b'"}',
        b"{" + b",".join(b'"%d":0' % n for n in range(10**5)) + b"}",
    ):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        survives(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    write_official(root / "source", tiny_config())
    write_store(root / "store", tiny_config())
    return root


JSON_FILES = [
    "high_noise_model/config.json",
    "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
    "google/umt5-xxl/tokenizer.json",
]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_p11_any_change_of_the_json_files_raises_only_lowvram_errors(
    folders: Path, data: st.DataObject
) -> None:
    name = data.draw(
        st.sampled_from([f"source/{item}" for item in JSON_FILES] + [f"store/{MANIFEST_NAME}"])
    )
    path = folders / name
    before = path.read_bytes()
    changed = json.loads(before)
    place = changed
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            place[key] = data.draw(VALUES | st.sampled_from(["../x", "/x", [], {}, 10**30]))
            break
        place = place[key]
    path.write_text(json.dumps(changed))
    text = ""
    try:
        (
            open_source(folders / "source")
            if name.startswith("source")
            else open_store(folders / "store")
        ).close()
    except LowvramError as error:
        text = str(error)
    finally:
        path.write_bytes(before)
    assert len(text.splitlines()) <= 1
