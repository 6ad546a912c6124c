"""Promise 6: a full disk is a clear error, before any work where that can be known, and costs
nothing that was written.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowvram.errors import DiskFullError, OutputError
from lowvram.files.write import output_error, replace_file
from lowvram.store.layout import StoredTensor
from lowvram.store.writer import StoreWriter

TENSORS = [StoredTensor(f"t{index}", "F32", (1024,), "copy", "") for index in range(8)]
Usage = namedtuple("Usage", "total used free")


def content(tensor: StoredTensor) -> torch.Tensor:
    return torch.full(tensor.shape, float(tensor.name[1:]))


def write(path: Path, resume: bool) -> None:
    with StoreWriter(path, TENSORS, {}, {"recipe": "x"}, resume, sync_bytes=5000) as writer:
        for tensor in writer.remaining:
            writer.write(content(tensor))
        writer.finish()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("expected") / "x.safetensors"
    write(path, resume=False)
    return path.read_bytes()


def test_p06_too_little_room_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**6, 10**6 - 30_000, 30_000))
    with pytest.raises(DiskFullError, match=r"needs 33\.\d+ kB, but .* has 30\.00 kB free"):
        write(tmp_path / "new" / "x.safetensors", resume=False)
    assert not any((tmp_path / "new").glob("*"))


def test_p06_resume_asks_only_for_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    with StoreWriter(path, TENSORS, {}, {"recipe": "x"}, resume=False) as writer:
        for tensor in TENSORS[:6]:
            writer.write(content(tensor))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**6, 10**6 - 8000, 8000))
    with pytest.raises(DiskFullError):
        write(path, resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**6, 10**6 - 8192, 8192))
    write(path, resume=True)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_p06_no_room_at_each_write_keeps_the_old_output_and_can_go_on(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    real, kind = os.write, OutputError if code == errno.EIO else DiskFullError
    path = tmp_path / "x.safetensors"
    for at in range(1, 100):
        path.write_bytes(b"old")
        calls = 0

        def failing(fd: int, data: memoryview) -> int:
            nonlocal calls
            calls += 1
            if calls < at:  # noqa: B023  (used within its own turn)
                return real(fd, data)
            if calls == at and len(data) > 1:  # noqa: B023
                return real(fd, data[: len(data) // 2])  # a full disk takes part of the last write
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing)
            try:
                write(path, resume=False)
                break
            except OutputError as error:
                raised = error
        assert type(raised) is kind, at
        assert str(path) in str(raised)
        assert path.read_bytes() == b"old", at
        write(path, resume=True)
        assert path.read_bytes() == expected, at
    assert 10 < at < 99


def test_p06_failing_sync_is_an_error_and_nothing_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    real = os.fsync
    for at in range(1, 100):
        calls = 0

        def failing(fd: int) -> None:
            nonlocal calls
            calls += 1
            if calls >= at:  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                write(path, resume=False)
                break
            except DiskFullError:
                assert not path.exists() or path.read_bytes() == expected
        write(path, resume=True)
        assert path.read_bytes() == expected
        path.unlink()
    assert 5 < at < 99


def test_same_writer_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    path = tmp_path / "x.safetensors"
    real = os.write
    with StoreWriter(path, TENSORS, {}, {"recipe": "x"}, resume=False) as writer:
        writer.write(content(TENSORS[0]))
        for tensor in TENSORS[1:]:
            with monkeypatch.context() as patch:
                patch.setattr(
                    os,
                    "write",
                    lambda fd, data: (
                        real(fd, data[:7]),
                        (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")),
                    ),
                )
                with pytest.raises(DiskFullError):
                    writer.write(content(tensor))
            writer.write(content(tensor))
        writer.finish()
    assert path.read_bytes() == expected


def test_journal_line_cut_by_a_full_disk_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    path, real = tmp_path / "x.safetensors", os.write

    def full_for_journal(fd: int, data: memoryview) -> int:
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(".journal"):
            return real(fd, data)
        if len(data) > 20:
            return real(fd, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StoreWriter(path, TENSORS, {}, {"recipe": "x"}, resume=False, sync_bytes=1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full_for_journal)
            with pytest.raises(DiskFullError):
                writer.write(content(TENSORS[0]))
        writer.write(content(TENSORS[1]))
    with StoreWriter(path, TENSORS, {}, {"recipe": "x"}, resume=True) as writer:
        assert len(writer.remaining) == 6
    write(path, resume=True)
    assert path.read_bytes() == expected


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 32 kB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        mounted = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)],
                capture_output=True,
            ).returncode
            == 0
        )
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_p06_real_small_file_system(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    path = tmpfs / "x.safetensors"
    with pytest.raises(DiskFullError, match="make room first"):
        write(path, resume=False)
    with monkeypatch.context() as patch:
        # others fill the disk after the check
        patch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 0, 10**9))
        with pytest.raises(DiskFullError, match="No space left on device"):
            write(path, resume=False)
    assert not path.exists()
    subprocess.run(["mount", "-o", "remount,size=128k", str(tmpfs)], check=True)
    with StoreWriter(path, TENSORS, {}, {"recipe": "x"}, resume=True, sync_bytes=5000) as writer:
        assert 0 < len(writer.remaining) < 8, "the tensors that fitted are kept"
    write(path, resume=True)
    assert path.read_bytes() == expected


def test_p06_real_limit_on_file_size(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "x.safetensors"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            write(path, resume=False)
        except OutputError as error:
            code = 42 if "ulimit -f" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert not path.exists()
    write(path, resume=True)
    assert path.read_bytes() == expected


def test_small_files_are_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lowvram.json"
    replace_file(path, b"first")
    real = os.write
    monkeypatch.setattr(
        os,
        "write",
        lambda fd, data: (
            real(fd, data[:3])
            if len(data) > 3
            else (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
        ),
    )
    with pytest.raises(DiskFullError):
        replace_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["lowvram.json"]


def test_an_interrupted_replacement_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "lowvram.json"
    replace_file(path, b"first")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["lowvram.json"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EEXIST, "it is a file: choose a folder that does not exist"),
        (errno.ENOTDIR, "a part of this path is a file: choose another folder"),
        (errno.EISDIR, "it is a folder: choose another name"),
        (errno.EACCES, "choose another folder or change its permissions"),
        (errno.EROFS, "choose another folder or disk"),
        (errno.EIO, "choose another folder or disk"),
        (errno.ENOSPC, "make room and run it again"),
    ],
)
def test_every_error_of_the_system_says_what_to_do(code: int, advice: str) -> None:
    message = str(output_error(Path("models/a"), OSError(code, os.strerror(code))))
    for text in ("models/a", os.strerror(code), advice):
        assert text in message


def test_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot write .*choose a"):
        write(tmp_path / "file" / "x.safetensors", resume=False)
