"""Disks that fail while a video is made: it ends in the same bits, or in an error that names file, block and byte (promise 16)."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.checkpoint.store import Store
from lowvram.errors import CheckpointError
from lowvram.memory.plan import Choice
from lowvram.pipeline import Pipeline
from lowvram.streaming import source
from lowvram.streaming.source import BlockFile
from tests.runs import digest, pipeline_of, plan_of, request_of
from tests.runtime.staged import StagedPipeline

StoreOf = Callable[[str], Store]
CHOICE = Choice(64, 1, 0, 1, False, pinned_blocks=1)


class Disk:
    """Counts reads; those that `fails` names end in an I/O error. Blocks are read in parts of 64 KiB, so that threads share them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, Path, int], bool] = lambda number, path, offset: False
    ) -> None:
        self.reads, self.failures, self._lock = 0, 0, threading.Lock()
        real, begin = BlockFile._pread, BlockFile.__init__

        def pread(file: BlockFile, target: memoryview, offset: int) -> int:
            with self._lock:
                number, self.reads = self.reads, self.reads + 1
                failing = fails(number, file.path, offset)
                self.failures += failing
            if failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(file, target, offset)

        def small_parts(file: BlockFile, path: Path, ranges: list[tuple[int, int]]) -> None:
            begin(file, path, ranges, 64 * 2**10)

        monkeypatch.setattr(BlockFile, "_pread", pread)
        monkeypatch.setattr(BlockFile, "__init__", small_parts)
        monkeypatch.setattr(source, "RETRY_DELAYS_S", (1e-4, 1e-4, 1e-4))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lowvram")]


@pytest.fixture
def pipelines(tiny_store: StoreOf) -> list[Pipeline]:
    return [pipeline_of(tiny_store("int8")), StagedPipeline(tiny_store("int8"))]


def frames_of(pipeline: Pipeline) -> str:
    request = request_of(pipeline, steps=2, shift=5.0)
    plan = plan_of(pipeline, request, CHOICE)
    return digest(pipeline.generate(request, plan=plan).frames)


def test_p16_reads_that_fail_now_and_then_change_no_bit(
    pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        expected = frames_of(pipelines[0])
    assert disk.reads > 50
    for pipeline in pipelines:
        for first in (0, 5, disk.reads // 2, disk.reads - 1):
            caplog.clear()
            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
                faulty = Disk(patch, lambda number, path, offset, first=first: number >= first and (number - first) % 37 == 0)
                assert frames_of(pipeline) == expected
            assert faulty.failures
            assert len([r for r in caplog.records if "trying again" in r.getMessage()]) == faulty.failures
            assert not threads()


@pytest.mark.parametrize("component", ["text_encoder", "high_noise", "low_noise"])
def test_p16_a_block_that_cannot_be_read_is_named(pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch, component: str) -> None:
    for pipeline in pipelines:
        block = pipeline.store.files[component].blocks[1]
        bad = block.start + block.nbytes // 2

        def fails(number: int, path: Path, offset: int, bad: int = bad) -> bool:
            return path.stem == component and offset <= bad < offset + 64 * 2**10

        said = rf"{component}\.safetensors: reading block 1 at byte \d+ failed: Input/output error, 4 times"
        with monkeypatch.context() as patch:
            Disk(patch, fails)
            with pytest.raises(CheckpointError, match=said) as failed:
                frames_of(pipeline)
        named = int(str(failed.value).split("at byte ")[1].split()[0])
        assert named <= bad < named + 64 * 2**10
        assert not threads()


def test_a_stopped_run_leaves_no_thread_and_no_open_file(pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by the listener while workers read ahead: as Ctrl-C would."""
    Disk(monkeypatch)

    def interrupt(event: object) -> None:
        if getattr(event, "phase", "") == "denoise" and getattr(event, "done", 0) == 1:
            raise KeyboardInterrupt

    for pipeline in pipelines:
        before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
        request = request_of(pipeline, steps=2, shift=5.0)
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(request, listener=interrupt)
        assert not threads()
        assert (len(list(Path("/proc/self/fd").iterdir())) if before else 0) == before
