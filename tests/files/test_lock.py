"""Promise 7: one writer per output; the second names the first's process; a lock of the dead is
taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from lowvram.errors import OutputError
from lowvram.files import lock
from lowvram.files.lock import LOCK_NAME, OutputLock


def holder(folder: Path) -> int:
    """A process that takes the lock and keeps it until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            OutputLock(folder)
            (folder / "held").touch()
            time.sleep(60)
        finally:
            os._exit(1)
    while not (folder / "held").exists():
        time.sleep(0.005)
    return pid


def test_p07_second_writer_is_refused_and_names_the_first(tmp_path: Path) -> None:
    pid = holder(tmp_path)
    try:
        with pytest.raises(OutputError, match=f"is being written by process {pid}:"):
            OutputLock(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_p07_lock_of_a_killed_process_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid = holder(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK_NAME).exists()
    with OutputLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert f"left by process {pid}, which is gone" in caplog.text


def test_p07_second_lock_of_the_same_process_is_refused(tmp_path: Path) -> None:
    with OutputLock(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()}:"):
        OutputLock(tmp_path)
    OutputLock(tmp_path).release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_p07_folder_is_made_and_output_of_others_is_independent(tmp_path: Path) -> None:
    with OutputLock(tmp_path / "a" / "b"), OutputLock(tmp_path / "a" / "c"):
        assert (tmp_path / "a" / "b" / LOCK_NAME).exists()


def test_p07_living_holder_is_believed_where_locks_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, mode: None)
    with OutputLock(tmp_path), pytest.raises(OutputError, match=f"process {os.getpid()}:"):
        OutputLock(tmp_path)


def test_p07_lock_file_removed_by_its_holder_in_between_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    calls: list[int] = []

    def flock(fd: int, mode: int) -> None:
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(fd)
        real(fd, mode)

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(OutputError):
            OutputLock(tmp_path)


def test_p07_the_holder_stands_beside_the_lock_where_a_locked_file_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setattr(lock, "HOLDER_SUFFIX", ".pid")
    with OutputLock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_bytes() == b""
        assert json.loads((tmp_path / f"{LOCK_NAME}.pid").read_text())["pid"] == os.getpid()
        with pytest.raises(OutputError, match=f"process {os.getpid()}:"):
            OutputLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


STALE = {
    "empty": b"",
    "cut": b"{",
    "a list": b"[]",
    "no text": b"\xff",
    "a word": b'{"pid": "x"}',
    "negative": b'{"pid": -1}',
    "true": b'{"pid": true}',
    "no process": b'{"pid": 4194305}',
    "a float": b'{"pid": 1e300}',
    "reused": json.dumps(
        {"pid": os.getpid(), "started": 1.0, "host": socket.gethostname()}
    ).encode(),
    "elsewhere": json.dumps(
        {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": "elsewhere"}
    ).encode(),
}


@pytest.mark.parametrize("name", STALE)
def test_p07_stale_lock_is_recognised(name: str, tmp_path: Path) -> None:
    """Also where the process id was given to another process since, or comes from another
    machine.
    """
    (tmp_path / LOCK_NAME).write_bytes(STALE[name])
    OutputLock(tmp_path).release()


def test_p07_of_many_at_once_one_holds_it(tmp_path: Path) -> None:
    pids = []
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(30):
                    code = max(code, try_once(tmp_path))
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert max(codes) <= 2, "two processes held the lock at once"
    assert 2 in codes


def try_once(folder: Path) -> int:
    """2 where the lock was held alone, 1 where it was refused, 3 where another held it as well."""
    try:
        with OutputLock(folder):
            try:
                (folder / "inside").mkdir()
            except FileExistsError:
                return 3
            time.sleep(0.002)
            (folder / "inside").rmdir()
            return 2
    except OutputError:
        return 1
