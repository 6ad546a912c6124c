"""Names of outputs: fresh ones, and names of ours that something else has."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from lowvram.errors import OutputError
from lowvram.files.lock import OutputLock
from lowvram.files.output import SUFFIXES, check_output, fresh_outputs
from lowvram.files.write import replace_file

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes are POSIX's")


def test_a_fresh_name_is_neither_a_clip_nor_an_interrupted_run(tmp_path: Path) -> None:
    assert next(fresh_outputs(tmp_path)) == tmp_path / "clip.mp4"
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "clip-2.mp4.resume").touch()
    assert next(fresh_outputs(tmp_path)) == tmp_path / "clip-3.mp4"
    assert next(fresh_outputs(tmp_path, resume=True)) == tmp_path / "clip-2.mp4"
    (tmp_path / "clip-2.mp4.resume").unlink()
    assert next(fresh_outputs(tmp_path, resume=True)) == tmp_path / "clip-2.mp4"


def in_the_way(path: Path, kind: str, target: Path) -> None:
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@posix
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_p28_what_has_a_name_of_ours_is_refused_before_the_run(
    suffix: str, kind: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    in_the_way(tmp_path / f"clip.mp4{suffix}", kind, target)
    with pytest.raises(OutputError, match=f"clip.mp4{suffix} is .*: remove or rename it"):
        check_output(tmp_path / "clip.mp4", overwrite=True)
    assert target.read_text() == "mine"


@posix
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_p28_no_file_is_written_through_what_has_its_temporary_name(
    kind: str, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    in_the_way(tmp_path / "file.partial", kind, target)
    with pytest.raises(OutputError, match=r"file\.partial is"):
        replace_file(tmp_path / "file", b"new")
    assert target.read_text() == "mine"
    assert not (tmp_path / "file").exists()


@posix
def test_p28_another_name_of_a_temporary_file_keeps_its_content(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    os.link(target, tmp_path / "file.partial")
    replace_file(tmp_path / "file", b"new")
    assert target.read_text() == "mine"
    assert (tmp_path / "file").read_bytes() == b"new"


@posix
@pytest.mark.parametrize("is_file", [False, True])
def test_p28_the_lock_is_not_taken_through_a_link(is_file: bool, tmp_path: Path) -> None:
    output, target = tmp_path / "output", tmp_path / "target"
    lock = OutputLock(output, is_file=is_file)
    path = lock.path
    lock.release()
    target.write_text("mine")
    path.symlink_to(target)
    with pytest.raises(OutputError, match="is a link"):
        OutputLock(output, is_file=is_file)
    assert target.read_text() == "mine"


def test_p27_a_clip_belongs_to_one_run_and_others_beside_it_are_free(tmp_path: Path) -> None:
    with (
        OutputLock(tmp_path / "a.mp4", is_file=True),
        OutputLock(tmp_path / "b.mp4", is_file=True),
        pytest.raises(OutputError, match=rf"a.mp4 is being written by process {os.getpid()}"),
    ):
        OutputLock(tmp_path / "a.mp4", is_file=True)
    assert list(tmp_path.iterdir()) == []


def test_p30_the_lock_of_a_long_name_is_short(tmp_path: Path) -> None:
    with OutputLock(tmp_path / ("a" * 251 + ".mp4"), is_file=True) as lock:
        assert len(lock.path.name) < 60


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has its own locks")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_p30_without_locks_the_named_process_decides(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FileLock) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with OutputLock(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()}"):
        OutputLock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    OutputLock(tmp_path).release()
