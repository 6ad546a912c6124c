"""Tensors are views of their own pages, given back when they die; writing into one changes nothing on disk."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram.checkpoint.header import TruncatedFileError
from lowvram.checkpoint.tensors import DTYPE_CODES, SMALL_BYTES, TORCH_DTYPES, TensorFile
from lowvram.errors import CheckpointError

BIG = 2 * SMALL_BYTES


def mapped_bytes(path: Path) -> int:
    """Bytes of address space that maps `path` in this process."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            total += end - start
    return total


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big.safetensors"
    save_file({"first": torch.arange(BIG // 4, dtype=torch.int32), "second": torch.randn(BIG // 8, 2), "small": torch.ones(3)}, path)
    return path


@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_every_dtype_reads_back_bit_for_bit(code: str, tmp_path: Path) -> None:
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (6 * TORCH_DTYPES[code].itemsize,), dtype=torch.uint8)
    tensor = raw.view(TORCH_DTYPES[code]).reshape(2, 3)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.header.tensors["x"].dtype == code == DTYPE_CODES[tensor.dtype]
        found = file.read("x")
    assert found.dtype == tensor.dtype
    assert torch.equal(found.contiguous().view(torch.uint8), tensor.view(torch.uint8))


def test_reads_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.read("scalar").shape == ()
        assert file.read("scalar").item() == 3.5
        assert file.read("none").shape == (0, 4)


def test_big_tensor_maps_only_its_own_pages_and_gives_them_back(big_file: Path) -> None:
    with TensorFile(big_file) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = file.read("second")
        info = file.header.tensors["second"]
        assert info.nbytes <= mapped_bytes(big_file) <= info.nbytes + 2 * os.sysconf("SC_PAGE_SIZE")
        view = tensor[5:]
        del tensor
        gc.collect()
        assert mapped_bytes(big_file) > 0, "a view keeps the map"
        del view
        gc.collect()
        assert mapped_bytes(big_file) == 0


def test_small_tensor_holds_no_map(big_file: Path) -> None:
    with TensorFile(big_file) as file:
        small = file.read("small")
        assert mapped_bytes(big_file) == 0
        assert torch.equal(small, torch.ones(3))


def test_writing_into_a_tensor_leaves_the_file_alone(big_file: Path) -> None:
    before = big_file.read_bytes()
    with TensorFile(big_file) as file:
        for name in ("first", "small"):
            file.read(name).zero_()
        assert torch.equal(file.read("first"), torch.arange(BIG // 4, dtype=torch.int32))
    assert big_file.read_bytes() == before


def test_tensors_outlive_the_file(big_file: Path) -> None:
    with TensorFile(big_file) as file:
        tensor = file.read("first")
    big_file.unlink()
    assert torch.equal(tensor, torch.arange(BIG // 4, dtype=torch.int32))


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    values = torch.randn(BIG // 4)
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[%d],"data_offsets":[1,%d]}}'
    text %= (values.numel(), 1 + values.nbytes)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + values.numpy().tobytes())
    with TensorFile(path) as file:
        assert file.header.tensors["w"].start % 4
        tensor = file.read("w")
    assert tensor.data_ptr() % 4 == 0, "kernels may rely on it"
    assert torch.equal(tensor, values)


def test_threads_read_the_same(big_file: Path) -> None:
    wrong = []
    with TensorFile(big_file) as file:

        def read() -> None:
            for _ in range(50):
                if not torch.equal(file.read("small"), torch.ones(3)) or int(file.read("first")[7]) != 7:
                    wrong.append(1)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_file_cut_after_its_header_was_read_is_refused(big_file: Path) -> None:
    with TensorFile(big_file) as file:
        os.truncate(big_file, BIG)
        with pytest.raises(TruncatedFileError, match="changed meanwhile"):
            file.read("first")


def test_unknown_name_is_refused(big_file: Path) -> None:
    with TensorFile(big_file) as file, pytest.raises(CheckpointError, match="'third'"):
        file.read("third")
