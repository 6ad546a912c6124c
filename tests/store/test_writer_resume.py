"""Promises 1, 2, 5: a writer killed at any moment goes on to the same bytes, and a final name
exists only when complete.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import read_header
from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.errors import CheckpointError, ResumeError
from lowvram.store.layout import StoredTensor
from lowvram.store.writer import StoreWriter

DTYPES = ("F32", "BF16", "I8", "U8", "F8_E4M3")
METADATA = {"b": "2", "a": "ü"}
IDENTITY = {"recipe": "int8", "source": "f00d", "version": "0.1.0"}
real_write, real_fsync = os.write, os.fsync


def plan(count: int = 8, rows: int = 3) -> list[StoredTensor]:
    return [
        StoredTensor(f"t{index}", DTYPES[index % 5], (rows, 64 + index), "copy", "")
        for index in range(count)
    ]


def content(tensor: StoredTensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(tensor.name) * 7 + sum(map(ord, tensor.name)))
    return (
        torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        .view(TORCH_DTYPES[tensor.dtype])
        .reshape(tensor.shape)
    )


def write(
    path: Path,
    tensors: list[StoredTensor],
    resume: bool,
    sync_bytes: int = 300,
    pause_s: float = 0.0,
) -> dict[str, str]:
    with StoreWriter(path, tensors, METADATA, IDENTITY, resume, sync_bytes) as writer:
        for tensor in writer.remaining:
            writer.write(content(tensor))
            time.sleep(pause_s)
        return writer.finish()


def child(run: Callable[[], object]) -> int:
    """Starts `run` in a process of its own and returns its id; it exits with 0, or with 1 on any
    exception.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, str]]:
    path = tmp_path_factory.mktemp("reference") / "x.safetensors"
    hashes = write(path, plan(), resume=False)
    return path.read_bytes(), hashes


def test_p01_killed_at_random_moments_ends_in_the_same_bytes(tmp_path: Path) -> None:
    tensors = plan(60)
    write(tmp_path / "whole.safetensors", tensors, resume=False)
    path = tmp_path / "x.safetensors"
    chance = random.Random(1)
    for number in range(20):
        pid = child(lambda: write(path, tensors, resume=True, pause_s=0.02))
        time.sleep(chance.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL, f"run {number} was done before it was killed"
        assert not path.exists()
    partial = path.with_name("x.safetensors.partial")
    assert partial.stat().st_size > 1000, "no run got anywhere"
    hashes = write(path, tensors, resume=True)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert list(hashes) == [tensor.name for tensor in tensors]
    assert not partial.exists()


class Crash:
    """Dies at the `at`-th write, fsync or rename: before it, after it, or with half of it done.
    Notes what was synced.
    """

    def __init__(self, at: int, mode: str, notes: Path) -> None:
        self.left, self.mode, self.notes = at, mode, notes
        self.synced: dict[str, int] = {}

    def install(self) -> None:
        os.write = self._around(self._write)  # type: ignore[assignment]
        os.fsync = self._around(self._fsync)  # type: ignore[assignment]
        os.replace = self._around(os.replace)  # type: ignore[assignment]

    def _around(self, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: Any) -> object:
            self.left -= 1
            if self.left == 0 and self.mode == "half" and call == self._write:
                real_write(args[0], bytes(args[1])[: max(1, len(bytes(args[1])) // 2)])
            if self.left == 0 and self.mode != "after":
                os._exit(9)
            result = call(*args)
            if self.left == 0:
                os._exit(9)
            return result

        return run

    def _write(self, fd: int, data: bytes) -> int:
        return real_write(fd, data)

    def _fsync(self, fd: int) -> None:
        real_fsync(fd)
        self.synced[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size
        lines = "".join(f"{size} {name}\n" for name, size in self.synced.items())
        self.notes.write_text(lines)


def lose_power(folder: Path, notes: Path) -> None:
    """Takes from every unfinished file what was not synced."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    synced = {name: int(size) for size, name in (line.split(" ", 1) for line in lines)}
    for path in folder.glob("*.partial*"):
        os.truncate(path, synced.get(str(path), 0))


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_p01_death_at_every_system_call_ends_in_the_same_bytes(
    mode: str, power_cut: bool, tmp_path: Path
) -> None:
    tensors = plan(3)
    hashes = write(tmp_path / "whole", tensors, resume=False)
    whole = (tmp_path / "whole").read_bytes()

    def dying(crash: Crash, path: Path) -> None:
        crash.install()
        write(path, tensors, resume=False)

    for at in range(1, 200):
        folder = tmp_path / str(at)
        folder.mkdir()
        path, notes = folder / "x.safetensors", tmp_path / f"{at}.synced"
        crash = Crash(at, mode, notes)
        code = exit_code(child(partial(dying, crash, path)))
        if code == 0:
            break
        assert code == 9
        if power_cut:
            lose_power(folder, notes)
        if path.exists():
            assert path.read_bytes() == whole, f"incomplete under its final name after call {at}"
        assert write(path, tensors, resume=True) == hashes, f"after call {at}"
        assert path.read_bytes() == whole, f"after call {at}"
        assert sorted(item.name for item in folder.iterdir()) == [
            "x.safetensors",
            "x.safetensors.partial.journal",
        ]
    assert 15 < at < 199


def test_resume_writes_only_what_is_left(
    tmp_path: Path, reference: tuple[bytes, dict[str, str]]
) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        for tensor in plan()[:5]:
            writer.write(content(tensor))
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=True) as writer:
        assert [tensor.name for tensor in writer.remaining] == ["t5", "t6", "t7"]
        assert writer.written_bytes == sum(tensor.nbytes for tensor in plan()[:5])
        for tensor in writer.remaining:
            writer.write(content(tensor))
        assert writer.finish() == reference[1]
    assert path.read_bytes() == reference[0]


def test_finished_file_is_found_done_on_resume(
    tmp_path: Path, reference: tuple[bytes, dict[str, str]]
) -> None:
    path = tmp_path / "x.safetensors"
    write(path, plan(), resume=False)
    changed_ns = path.stat().st_mtime_ns
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=True) as writer:
        assert writer.remaining == []
        assert writer.finish() == reference[1]
    assert path.stat().st_mtime_ns == changed_ns
    (tmp_path / "x.safetensors.partial.journal").unlink()
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=True) as writer:
        assert len(writer.remaining) == 8, "without its journal a finished file is not trusted"


def test_p02_start_without_resume_names_and_removes_leftovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        writer.write(content(plan()[0]))
    with StoreWriter(path, plan(), METADATA, {"recipe": "other"}, resume=False) as writer:
        assert len(writer.remaining) == 8
    assert "x.safetensors.partial, left by a run that did not finish" in caplog.text


def test_p02_old_output_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        for tensor in plan()[:-1]:
            writer.write(content(tensor))
        with pytest.raises(CheckpointError, match="lacks 1 tensors, first t7"):
            writer.finish()
        assert path.read_bytes() == b"old"
        writer.write(content(plan()[-1]))
        writer.finish()
    read_header(path)


@pytest.mark.parametrize("key", IDENTITY)
def test_p05_resume_with_another_identity_names_both_values(key: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        writer.write(content(plan()[0]))
    before = sorted((item.name, item.read_bytes()) for item in tmp_path.iterdir())
    with pytest.raises(ResumeError, match=f"{key} was '{IDENTITY[key]}' and is now 'other'"):
        StoreWriter(path, plan(), METADATA, IDENTITY | {key: "other"}, resume=True)
    assert sorted((item.name, item.read_bytes()) for item in tmp_path.iterdir()) == before


@pytest.mark.parametrize("change", ["tensors", "metadata"])
def test_p05_resume_with_another_layout_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        writer.write(content(plan()[0]))
    tensors, metadata = (plan(9), METADATA) if change == "tensors" else (plan(), {"a": "1"})
    with pytest.raises(ResumeError, match="header was"):
        StoreWriter(path, tensors, metadata, IDENTITY, resume=True)


@pytest.mark.parametrize("damage", ["cut data", "other header", "journal order"])
def test_resume_from_damaged_leftovers_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        for tensor in plan()[:3]:
            writer.write(content(tensor))
    partial, journal = (
        path.with_name(path.name + suffix) for suffix in (".partial", ".partial.journal")
    )
    if damage == "cut data":
        os.truncate(partial, partial.stat().st_size - 1)
    elif damage == "other header":
        partial.write_bytes(partial.read_bytes().replace(b'"t7"', b'"t8"'))
    else:
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join([lines[0], lines[2], lines[1], lines[3]]))
    with pytest.raises(ResumeError, match="start again without --resume"):
        StoreWriter(path, plan(), METADATA, IDENTITY, resume=True)


def test_cut_or_foreign_journal_lines_are_dropped(
    tmp_path: Path, reference: tuple[bytes, dict[str, str]]
) -> None:
    path = tmp_path / "x.safetensors"
    journal = path.with_name(path.name + ".partial.journal")
    for tail in (
        b'{"name": "t3", "sha',
        b'{"name": "t3", "sha256": "00"}',
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
    ):
        with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
            for tensor in plan()[:3]:
                writer.write(content(tensor))
        with open(journal, "ab") as file:
            file.write(tail)
        with StoreWriter(path, plan(), METADATA, IDENTITY, resume=True) as writer:
            assert writer.remaining[0].name == "t3"
        assert write(path, plan(), resume=True) == reference[1]


def test_file_is_what_the_layout_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, plan(), resume=False)
    header = read_header(path)
    assert header.data_start % 256 == 0
    assert list(header.metadata.items()) == [("a", "ü"), ("b", "2")]
    assert path.read_bytes()[8:25] == b'{"__metadata__":{'
    assert list(header.tensors) == [tensor.name for tensor in plan()]
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)
    assert starts[0] == header.data_start
    with TensorFile(path) as file:
        for tensor in plan():
            assert torch.equal(
                file.read(tensor.name).view(torch.uint8), content(tensor).view(torch.uint8)
            )


def test_wrong_tensor_is_refused_and_the_writer_goes_on(
    tmp_path: Path, reference: tuple[bytes, dict[str, str]]
) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, plan(), METADATA, IDENTITY, resume=False) as writer:
        for wrong in (
            content(plan()[1]),
            content(plan()[0]).flatten(),
            content(plan()[0]).double(),
        ):
            with pytest.raises(CheckpointError, match=r"t0 must be F32 \[3, 64\]"):
                writer.write(wrong)
        transposed = content(plan()[0]).t().contiguous().t()
        assert not transposed.is_contiguous()
        assert writer.write(transposed) == reference[1]["t0"]
        for tensor in writer.remaining:
            writer.write(content(tensor))
        with pytest.raises(CheckpointError, match="all 8 tensors are written"):
            writer.write(content(plan()[0]))
        writer.finish()
    assert path.read_bytes() == reference[0]
    with pytest.raises(CheckpointError):
        writer.write(content(plan()[0]))


def test_scalars_and_empty_tensors_are_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = [
        StoredTensor("none", "F32", (0, 3), "copy", ""),
        StoredTensor("one", "F32", (), "copy", ""),
    ]
    with StoreWriter(path, tensors, {}, {}, resume=False) as writer:
        writer.write(torch.empty(0, 3))
        writer.write(torch.tensor(2.5))
        writer.finish()
    with TensorFile(path) as file:
        assert file.read("one").item() == 2.5
        assert file.read("none").shape == (0, 3)
