"""Tensors are copies, whole, by rows or in pieces; no file is ever mapped."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.tensor_data import (
    ALIGNMENT,
    DTYPE_CODES,
    SAMPLE_BYTES,
    TORCH_DTYPES,
    FileRows,
)
from lowvram.errors import CheckpointError, HeaderError
from lowvram.files import read as disk
from lowvram.store.reader import StoreFile

BIG = 2**21


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
    save_file(
        {
            "first": torch.arange(BIG // 4, dtype=torch.int32),
            "second": torch.randn(BIG // 8, 2),
            "small": torch.ones(3),
        },
        path,
    )
    return path


@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_every_dtype_reads_back_bit_for_bit(code: str, tmp_path: Path) -> None:
    raw = torch.randint(
        0, 2 if code == "BOOL" else 256, (6 * TORCH_DTYPES[code].itemsize,), dtype=torch.uint8
    )
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of maps")
def test_no_tensor_is_mapped(big_file: Path) -> None:
    with TensorFile(big_file) as file:
        tensors = [file.read(name) for name in file.tensors]
        assert mapped_bytes(big_file) == 0
        assert any(torch.equal(tensor, torch.ones(3)) for tensor in tensors)


def test_rows_and_pieces_are_those_of_the_whole(big_file: Path) -> None:
    with TensorFile(big_file) as file:
        whole, rows = file.read("second"), file.rows("second")
        assert isinstance(rows, FileRows)
        assert tuple(rows.shape) == tuple(whole.shape)
        assert rows.dtype == whole.dtype
        for part in (slice(0, 3), slice(7, 8), slice(0, 0), slice(BIG // 8 - 2, BIG), slice(None)):
            assert torch.equal(rows[part], whole[part])
        assert torch.equal(file.rows("small")[:], torch.ones(1, 3))
        data = b"".join(file.pieces("second", 1000))
        assert data == whole.numpy().tobytes()
        text = file.sample("second")
        assert text.startswith(data[:SAMPLE_BYTES])
        assert text.endswith(data[-SAMPLE_BYTES:])
        assert len(file.sample("small")) == 12


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
                if (
                    not torch.equal(file.read("small"), torch.ones(3))
                    or int(file.read("first")[7]) != 7
                ):
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
        with pytest.raises(HeaderError, match="has changed since it was opened"):
            file.read("first")


def test_unknown_name_is_refused(big_file: Path) -> None:
    with TensorFile(big_file) as file, pytest.raises(CheckpointError, match="'third'"):
        file.read("third")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of maps")
def test_what_a_run_reads_from_a_store_is_its_own(tmp_path: Path) -> None:
    """A disk that fails under a map ends the process, and a file that is written over changes one:
    copies know neither.
    """
    path = tmp_path / "store.safetensors"
    values = torch.randn(BIG // 4)
    save_file({"weight": values}, path)
    with StoreFile(path) as file:
        tensor = file.read("weight")
        assert mapped_bytes(path) == 0
        with open(path, "r+b") as handle:
            handle.seek(file.header.data_start)
            handle.write(bytes(BIG))
    assert torch.equal(tensor, values)


@pytest.mark.parametrize("name", ["first", "second", "small"])
def test_copies_are_aligned_and_equal(big_file: Path, name: str) -> None:
    with TensorFile(big_file) as file:
        copies = [file.read(name) for _ in range(4)]
        assert all(copy.data_ptr() % ALIGNMENT == 0 for copy in copies)
        assert all(torch.equal(copy, file.read(name)) for copy in copies)


class Faults:
    """Reads of the disk fail or give `fault(number)` bytes at most; None: all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[int], int | None]) -> None:
        self.reads, real = 0, disk.read_at

        def read_at(fd: int, target: memoryview, offset: int, seeking: threading.Lock) -> int:
            self.reads += 1
            most = fault(self.reads - 1)
            return real(fd, target if most is None else target[:most], offset, seeking)

        monkeypatch.setattr(disk, "read_at", read_at)
        monkeypatch.setattr(disk, "RETRY_DELAYS_S", (1e-4, 1e-4, 1e-4))


def fail(code: int, times: int) -> Callable[[int], int | None]:
    def fault(number: int) -> None:
        if number < times:
            raise OSError(code, os.strerror(code))

    return fault


@pytest.mark.parametrize(
    "fault",
    [fail(errno.EIO, 3), lambda number: 0 if number < 3 else None, lambda number: 300_000],
    ids=["EIO", "nothing", "short"],
)
def test_copies_of_a_disk_that_fails_are_read_again(
    big_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[int], int | None],
) -> None:
    with TensorFile(big_file) as file, caplog.at_level(logging.WARNING):
        expected, rows = file.read("second"), file.read("second")[[5, 0, 5]]
        reads: tuple[tuple[Callable[[], torch.Tensor], torch.Tensor], ...] = (
            (lambda: file.read("second"), expected),
            (lambda: file.read_rows("second", [5, 0, 5]), rows),
        )
        for read, wanted in reads:
            caplog.clear()
            with monkeypatch.context() as patch:
                faults = Faults(patch, fault)
                assert torch.equal(read(), wanted)
            assert faults.reads > 1
            assert len(caplog.records) in (0, 3)
            assert all(
                "big.safetensors: reading 'second' at byte" in record.getMessage()
                for record in caplog.records
            )


@pytest.mark.parametrize("name", ["first", "small"])
def test_a_tensor_that_the_disk_does_not_give_is_named(
    big_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Faults(monkeypatch, fail(errno.EIO, 10**6))
    said = (
        rf"big.safetensors: reading '{name}' at byte \d+ failed: Input/output error, 4 "
        rf"times: check the disk"
    )
    with TensorFile(big_file) as file:
        with pytest.raises(CheckpointError, match=said) as failed:
            file.read(name)
        assert isinstance(failed.value.__cause__, OSError)
        with pytest.raises(CheckpointError, match=said):
            file.read_rows(name, [2])


def test_a_read_without_memory_is_no_fault_of_the_disk(
    big_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch, fail(errno.ENOMEM, 1))
    with TensorFile(big_file) as file, pytest.raises(OSError, match="Cannot allocate memory"):
        file.read("small")
    assert faults.reads == 1


def test_a_file_cut_while_it_is_copied_is_refused(
    big_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(number: int) -> int | None:
        if number == 1:
            os.truncate(big_file, BIG // 2)
        return 4096

    Faults(monkeypatch, cut)
    with (
        TensorFile(big_file) as file,
        pytest.raises(HeaderError, match=r"expected \d+ bytes of '(first|second)', found \d+"),
    ):
        file.read("first")


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send to oneself")
@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("ends", ["by itself", "with Ctrl-C"])
def test_a_disk_that_hangs_is_named_and_hears_ctrl_c(
    big_file: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    begun, released, real = threading.Event(), threading.Event(), disk.read_at

    def read_at(fd: int, target: memoryview, offset: int, seeking: threading.Lock) -> int:
        begun.set()
        assert released.wait(30), "the test has forgotten its reader"
        return real(fd, target, offset, seeking)

    def press() -> None:
        if begun.wait(10):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(disk, "read_at", read_at)
    monkeypatch.setattr(disk, "HANGING_READ_S", 0.5 if ends == "by itself" else 300.0)
    with TensorFile(big_file) as file:
        if ends == "by itself":
            with pytest.raises(
                CheckpointError,
                match=r"big.safetensors: 'first' cannot be read: .* no byte for 0 s: check "
                r"the disk",
            ):
                file.read("first")
        else:
            presser = threading.Thread(target=press)
            presser.start()
            with pytest.raises(KeyboardInterrupt):
                file.read("first")
            presser.join()
        (stuck,) = [thread for thread in threading.enumerate() if thread.name == "lowvram-read"]
        assert stuck.daemon, "the process may end without it"
        released.set()
        stuck.join(5)
        assert not stuck.is_alive()


def test_windows_has_no_preadv(big_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TensorFile(big_file) as file:
        expected = file.read("second")
        monkeypatch.delattr(os, "preadv", raising=False)
        assert torch.equal(file.read("second"), expected)
        assert torch.equal(file.read_rows("second", [7, 3]), expected[[7, 3]])


def test_a_file_that_is_gone_or_cannot_be_asked_is_named(
    big_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> object:
        raise OSError(errno.ESTALE, "Stale file handle")

    with TensorFile(big_file) as file, monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        with pytest.raises(CheckpointError) as failed:
            file.read("first")
        patch.undo()
        assert str(failed.value) == f"cannot read {big_file}: Stale file handle"
