"""Tests the quantizer under SIGKILL, full disks, concurrent runs and little memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from lowvram_quantize import build
from lowvram_quantize.convert import quantize

from lowvram.errors import CheckpointError, DiskFullError, OutputError
from lowvram.files.lock import LOCK_NAME
from lowvram.store.manifest import MANIFEST_NAME, STAGING_NAME
from lowvram.store.reader import open_store
from lowvram.store.writer import StoreWriter
from tests.helpers.checkpoints import tiny_config, write_official

CONFIG = tiny_config(num_layers=1)
KILLS = 50
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("source") / "official", CONFIG)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the file hashes of an uninterrupted run."""
    model = tmp_path_factory.mktemp("whole") / "m"
    quantize(source, model)
    return hashes(model)


def hashes(model: Path) -> dict[str, str]:
    files = [path for path in sorted(model.iterdir()) if path.is_file() and path.name != LOCK_NAME]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process and return its id; it exits with 0, or 1 if `work` raised."""
    child = os.fork()
    if child:
        return child
    code = 1
    with (
        contextlib.suppress(BaseException),
        # several journal entries per file, as with large models
        mock.patch.object(build, "StoreWriter", partial(StoreWriter, sync_bytes=100_000)),
    ):
        torch.set_num_threads(1)  # fork does not copy the parent's threads
        work()
        code = 0
    os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass
class Ticker:
    """Counts the progress reports of a forked run in its parent.

    So a kill can be timed by the number of reports, however slow the machine is.
    """

    ends: tuple[int, int] = field(default_factory=os.pipe)

    def report(self, _: object) -> None:
        os.write(self.ends[1], b".")

    def start(self, work: Callable[[], Any]) -> int:
        child = start(work)
        os.close(self.ends[1])
        return child

    def wait_for(self, count: int) -> int:
        """Wait for `count` reports or the end of the run; return the number of reports."""
        seen = 0
        while seen < count and os.read(self.ends[0], 1):
            seen += 1
        return seen

    def close(self) -> None:
        os.close(self.ends[0])


def count_reports(source: Path, model: Path) -> int:
    """Return the number of progress reports of an uninterrupted run."""
    ticker = Ticker()
    child = ticker.start(partial(quantize, source, model, threads=1, progress=ticker.report))
    seen = ticker.wait_for(1 << 30)
    ticker.close()
    assert wait(child) == 0
    return seen


@pytest.mark.slow
def test_p01_killed_at_any_moment_and_resumed_it_ends_in_the_same_bytes(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    reports = count_reports(source, tmp_path / "counted")
    draw, stages, done = random.Random(7), set(), 0
    for number in range(KILLS // 2):
        model = tmp_path / str(number)
        # the second run continues the first, so it has fewer reports
        for latest in (reports, reports // 2):
            ticker = Ticker()
            child = ticker.start(
                partial(quantize, source, model, threads=1, resume=True, progress=ticker.report)
            )
            ticker.wait_for(draw.randrange(latest))
            time.sleep(draw.uniform(0, 0.002))
            os.kill(child, signal.SIGKILL)
            ticker.close()
            wait(child)
            stages.add(stage(model))
        if (model / MANIFEST_NAME).exists():
            done += 1
            open_store(model).close()
        elif model.exists():
            with pytest.raises(CheckpointError):
                open_store(model)
        assert wait(start(partial(quantize, source, model, resume=True, threads=1))) == 0
        assert hashes(model) == whole
        assert not (model / STAGING_NAME).exists()
    assert {"high_noise", "low_noise", "text_encoder"} <= stages, f"kills met only {stages}"
    assert done <= KILLS // 4, f"{done} of {KILLS // 2} runs were over before their last kill"


def stage(model: Path) -> str:
    """Return the component whose file a killed run was writing, or "none"."""
    partials = [
        path.name.split(".")[0] for path in (model / STAGING_NAME).glob("*.safetensors.partial")
    ]
    return partials[0] if partials else "none"


class Crash(BaseException):
    """Simulates the end of the process."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], list[int]]:
    """Return a function that makes the n-th call of a function of `os` raise `Crash`.

    It returns a list that holds the number of calls.
    """

    def install(name: str, count: int) -> list[int]:
        real, calls = getattr(os, name), [0]

        def crashing(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                raise Crash
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, name, crashing)
        return calls

    return install


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_p01_a_crash_between_any_two_renames_is_resumed(
    overwrite: bool,
    source: Path,
    whole: dict[str, str],
    tmp_path: Path,
    crash_at: Callable[[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 0
    while True:
        count += 1
        model = tmp_path / str(count)
        if overwrite:
            quantize(source, model, "fp32")
        try:
            crash_at("replace", count)
            quantize(source, model, overwrite=overwrite)
        except Crash:
            monkeypatch.undo()
            (model / LOCK_NAME).unlink(missing_ok=True)
        else:
            break
        if (model / MANIFEST_NAME).exists():
            with open_store(model) as store:
                assert overwrite
                assert store.format == "fp32"
        quantize(source, model, resume=True)
        assert hashes(model) == whole
    # Renames: four component files and tokenizer, report and manifest in the staging folder, then
    # all seven to their final names. The last attempt is the one without a crash.
    assert count == 1 + 4 + 3 + 7


class FullDisk:
    """Replaces `os.write` with one on a disk that fills up: a short write, then ENOSPC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.written_bytes = 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**40))

    def __call__(self, fd: int, data: Any) -> int:
        fits = (
            memoryview(data).nbytes
            if self.room_bytes < 0
            else min(memoryview(data).nbytes, self.room_bytes - self.written_bytes)
        )
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.written_bytes += fits
        return self._write(fd, memoryview(data)[:fits])


@pytest.mark.slow
def test_p06_a_disk_that_fills_up_anywhere_leaves_the_old_store_and_a_run_to_resume(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, -1)
        quantize(source, tmp_path / "counted")
        total = disk.written_bytes
    old_model = tmp_path / "old"
    quantize(source, old_model, "fp8")
    old = hashes(old_model)
    for room in (
        0,
        50,
        5000,
        100_000,
        total // 3,
        total // 2,
        total - 60_000,
        total - 20_000,
        total - 100,
        total - 1,
    ):
        for model in (tmp_path / f"new-{room}", old_model):
            with monkeypatch.context() as patch:
                FullDisk(patch, room)
                with pytest.raises(DiskFullError, match="room"):
                    quantize(source, model, overwrite=model == old_model)
            if model == old_model:
                assert hashes(model) == old, room
            else:
                assert not (model / MANIFEST_NAME).exists(), room
        quantize(source, tmp_path / f"new-{room}", resume=True)
        assert hashes(tmp_path / f"new-{room}") == whole
    quantize(source, old_model, resume=True, overwrite=True)
    assert hashes(old_model) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if (
        os.geteuid() != 0
        or subprocess.run(command, capture_output=True, check=False).returncode != 0
    ):
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_p06_on_a_real_small_disk(
    source: Path, whole: dict[str, str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_disk / "m"
    with pytest.raises(DiskFullError, match="needs"):
        quantize(source, model)
    assert not model.exists()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**40))
        with pytest.raises(DiskFullError, match="room"):
            quantize(source, model)
    assert [path.name for path in model.iterdir()] == [STAGING_NAME]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    quantize(source, model, resume=True)
    assert hashes(model) == whole


def test_p07_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    model, ready = tmp_path / "m", tmp_path / "ready"

    def stall(progress: object) -> None:
        if getattr(progress, "phase", "") == "quantize":
            ready.touch()
            time.sleep(60)

    child = start(partial(quantize, source, model, threads=1, progress=stall))
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OutputError, match=rf"\b{child}\b"):
            quantize(source, model, resume=True)
        with pytest.raises(OutputError, match=rf"\b{child}\b"):
            quantize(source, model, overwrite=True)
        assert (model / STAGING_NAME).exists()
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)
    assert (model / LOCK_NAME).exists()
    quantize(source, model, resume=True)
    assert hashes(model) == whole


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from lowvram_quantize.convert import quantize
from lowvram.memory.usage import peak_rss_bytes
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
quantize(Path(sys.argv[1]), Path(sys.argv[2]), threads=2)
print(peak_rss_bytes())  # ru_maxrss would begin at the parent's size
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="RLIMIT_DATA covers maps on Linux alone"
)
def test_p09_memory_is_bounded_by_the_largest_tensor_not_by_the_source(tmp_path: Path) -> None:
    from scripts.bench.quantize import write_sparse_source

    config = tiny_config(dim=1024, ffn_dim=13824, num_heads=8, num_layers=10)
    write_sparse_source(tmp_path / "source", config, shards=2)
    limit = 4 * (config.dit.ffn_dim * config.dit.dim * 4) + 2**30
    files = [path.stat().st_size for path in (tmp_path / "source").rglob("*.safetensors")]
    assert sum(files) > 2 * limit
    command = [
        sys.executable,
        "-c",
        LIMITED,
        str(tmp_path / "source"),
        str(tmp_path / "m"),
        str(limit),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit
    open_store(tmp_path / "m").close()
