"""Disks that fail and memory that is gone while files are read: the same bits, or an error that
names what was read (promise 16).
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import pipeline as pipeline_module
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.errors import CheckpointError, LowvramError, OutOfMemoryError, ResumeError
from lowvram.files import read as disk_module
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import PlanChoice
from lowvram.progress import Progress
from lowvram.sampling.state import RunState, load_state
from lowvram.store.reader import Store
from lowvram.streaming.block_file import BlockFile
from tests.faults.inject import (
    FAST_RETRIES_S,
    Fails,
    Injection,
    always,
    at,
    cuda_error,
    first,
    io_error,
    never,
    no_memory,
)
from tests.helpers.runs import digest, pipeline_of, plan_of, request_of
from tests.helpers.staged import StagedPipeline
from tests.helpers.threads import lowvram_threads

StoreOf = Callable[[str], Store]
CHOICE = PlanChoice(64, 1, 0, 1, False, pinned_blocks=1)


def read_in_parts(patch: pytest.MonkeyPatch) -> None:
    """Read blocks in parts of 64 KiB, so that threads share them, and retry at once."""
    begin = BlockFile.__init__

    def small_parts(
        file: BlockFile, path: Path, ranges: list[tuple[int, int]], modified_ns: int | None = None
    ) -> None:
        begin(file, path, ranges, 64 * 2**10, modified_ns)

    patch.setattr(BlockFile, "__init__", small_parts)
    patch.setattr(disk_module, "RETRY_DELAYS_S", FAST_RETRIES_S)


@pytest.fixture
def pipelines(tiny_store: StoreOf) -> list[Pipeline]:
    return [pipeline_of(tiny_store("int8")), StagedPipeline(tiny_store("int8"))]


def frames_of(pipeline: Pipeline) -> str:
    request = request_of(pipeline, steps=2, shift=5.0)
    plan = plan_of(pipeline, request, CHOICE)
    return digest(pipeline.generate(request, plan=plan).frames)


def every_37th(first: int) -> Fails:
    return lambda number, *arguments: number >= first and (number - first) % 37 == 0


@pytest.mark.slow
def test_p16_reads_that_fail_now_and_then_change_no_bit(
    pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        read_in_parts(patch)
        disk = Injection(patch, BlockFile, "_pread", io_error, never)
        expected = frames_of(pipelines[0])
    assert disk.calls > 50
    for pipeline in pipelines:
        for begin in (0, 5, disk.calls // 2, disk.calls - 1):
            caplog.clear()
            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
                read_in_parts(patch)
                faulty = Injection(patch, BlockFile, "_pread", io_error, every_37th(begin))
                assert frames_of(pipeline) == expected
            assert faulty.failures
            assert (
                len([r for r in caplog.records if "trying again" in r.getMessage()])
                == faulty.failures
            )
            assert not lowvram_threads()


@pytest.mark.parametrize("component", ["text_encoder", "high_noise", "low_noise"])
def test_p16_a_block_that_cannot_be_read_is_named(
    pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    for pipeline in pipelines:
        block = pipeline.store.files[component].blocks[1]
        bad = block.start + block.nbytes // 2

        def fails(
            number: int, file: BlockFile, target: object, offset: int, bad: int = bad
        ) -> bool:
            return file.path.stem == component and offset <= bad < offset + 64 * 2**10

        said = (
            rf"{component}\.safetensors: reading block 1 at byte \d+ failed: Input/output "
            rf"error, 4 times"
        )
        with monkeypatch.context() as patch:
            read_in_parts(patch)
            Injection(patch, BlockFile, "_pread", io_error, fails)
            with pytest.raises(CheckpointError, match=said) as failed:
                frames_of(pipeline)
        named = int(str(failed.value).split("at byte ")[1].split()[0])
        assert named <= bad < named + 64 * 2**10
        assert not lowvram_threads()


def test_a_stopped_run_leaves_no_thread_and_no_open_file(
    pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by the listener while workers read ahead: as Ctrl-C would."""
    read_in_parts(monkeypatch)

    def interrupt(event: object) -> None:
        if getattr(event, "phase", "") == "denoise" and getattr(event, "done", 0) == 1:
            raise KeyboardInterrupt

    for pipeline in pipelines:
        before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
        request = request_of(pipeline, steps=2, shift=5.0)
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(request, listener=interrupt)
        assert not lowvram_threads()
        assert (len(list(Path("/proc/self/fd").iterdir())) if before else 0) == before


@pytest.mark.parametrize("staged", [False, True])
def test_p16_a_read_without_memory_takes_a_fallback_plan(
    tiny_store: StoreOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    staged: bool,
) -> None:
    """During the second of three steps, with a block in RAM to be given up."""
    store = tiny_store("int8")
    pipeline = StagedPipeline(store) if staged else pipeline_of(store)
    request = request_of(pipeline, steps=3, shift=5.0, negative_prompt="blurry")
    plan = plan_of(pipeline, request, CHOICE)
    reads = Injection(
        monkeypatch,
        BlockFile,
        "_pread",
        no_memory,
        never,
        counts=lambda file, *arguments: file.path.stem == "high_noise",
    )
    expected = digest(pipeline.generate(request, plan=plan).frames)
    # The last read for the second step, which is the last of this expert.
    reads.fails, reads.calls = at(reads.calls - 1), 0
    with caplog.at_level(logging.WARNING):
        assert digest(pipeline.generate(request, plan=plan).frames) == expected
    (said,) = [record.getMessage() for record in caplog.records]
    assert "out of RAM in step 2 of 3" in said
    assert "Cannot allocate memory" in said
    assert "reading every block from the disk" in said, "the block in RAM is given up"
    assert not lowvram_threads()


def reads_of(
    patch: pytest.MonkeyPatch,
    store: Store,
    component: str,
    name: str,
    error: Callable[[], OSError],
    fails: Fails = always,
) -> Injection:
    """Reads of one tensor outside the blocks fail; all other reads are real."""
    file = store.files[component]._file
    info = file.header.tensors[name]
    patch.setattr(disk_module, "RETRY_DELAYS_S", FAST_RETRIES_S)
    return Injection(
        patch,
        disk_module,
        "read_at",
        error,
        fails,
        counts=lambda fd, target, offset, seeking: (
            fd == file._file.fileno() and info.start <= offset < info.end
        ),
    )


@pytest.fixture(scope="module")
def expected(tiny_store: StoreOf) -> str:
    return frames_of(pipeline_of(tiny_store("int8")))


REST = [
    ("text_encoder", "token_embedding.weight"),
    ("text_encoder", "norm.weight"),
    ("high_noise", "time_projection.1.weight"),
    ("low_noise", "head.head.weight"),
    ("vae", "decoder.conv1.weight"),
]


@pytest.mark.parametrize(("component", "name"), REST)
def test_p16_tensors_outside_blocks_are_read_again(
    tiny_store: StoreOf,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    component: str,
    name: str,
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    rest = reads_of(monkeypatch, pipeline.store, component, name, io_error, first(3))
    with caplog.at_level(logging.WARNING):
        assert frames_of(pipeline) == expected
    assert rest.failures == 3 < rest.calls
    assert (
        len(
            [
                r
                for r in caplog.records
                if f"reading '{name}' at byte" in r.getMessage()
                and "trying again" in r.getMessage()
            ]
        )
        == 3
    )


@pytest.mark.parametrize(("component", "name"), REST)
def test_p16_a_tensor_that_cannot_be_read_is_named(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch, component: str, name: str
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    reads_of(monkeypatch, pipeline.store, component, name, io_error)
    said = (
        rf"{component}\.safetensors: reading '{name}' at byte \d+ failed: Input/output "
        rf"error, 4 times: check the disk and its cable"
    )
    with pytest.raises(CheckpointError, match=said):
        frames_of(pipeline)
    assert not lowvram_threads()


@pytest.mark.parametrize(("component", "name"), REST)
def test_p16_memory_that_is_gone_for_a_moment_while_a_tensor_is_read_changes_no_bit(
    tiny_store: StoreOf,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    component: str,
    name: str,
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    rest = reads_of(monkeypatch, pipeline.store, component, name, no_memory, at(0))
    with caplog.at_level(logging.WARNING):
        assert frames_of(pipeline) == expected
    assert rest.failures == 1
    assert "out of RAM" in caplog.text
    assert "check the disk" not in caplog.text


class Interrupted(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture
def interrupted(tiny_store: StoreOf, state_bytes: bytes, tmp_path: Path) -> tuple[Pipeline, Path]:
    """A pipeline, and the state that it has left after one of two steps."""
    state = tmp_path / "clip.mp4.resume"
    state.write_bytes(state_bytes)
    return pipeline_of(tiny_store("int8")), state


@pytest.fixture(scope="module")
def state_bytes(tiny_store: StoreOf, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pipeline, state = (
        pipeline_of(tiny_store("int8")),
        tmp_path_factory.mktemp("state") / "clip.mp4.resume",
    )

    def stop(event: Progress) -> None:
        if event.phase == "denoise" and event.done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        pipeline.generate(request_of(pipeline, steps=2, shift=5.0), state_file=state, listener=stop)
    return state.read_bytes()


def resumed(pipeline: Pipeline, state: Path) -> str:
    return digest(
        pipeline.generate(
            request_of(pipeline, steps=2, shift=5.0), state_file=state, resume=True
        ).frames
    )


Fault = Callable[[pytest.MonkeyPatch, Path], None]


def reading_raises(error: Callable[[], Exception]) -> Fault:
    """Where memory for a tensor of the state is asked for."""

    def plant(patch: pytest.MonkeyPatch, state: Path) -> None:
        Injection(
            patch,
            TensorFile,
            "read",
            error,
            counts=lambda file, *arguments: file.header.path == state,
        )

    return plant


def disk_raises(error: Callable[[], OSError]) -> Fault:
    """Where bytes of the state are asked for; the state is read before anything else."""

    def plant(patch: pytest.MonkeyPatch, state: Path) -> None:
        Injection(patch, disk_module, "read_at", error)
        patch.setattr(disk_module, "RETRY_DELAYS_S", FAST_RETRIES_S)

    return plant


def opening_raises(error: Callable[[], OSError]) -> Fault:
    """When the state's file is opened."""

    def plant(patch: pytest.MonkeyPatch, state: Path) -> None:
        Injection(patch, builtins, "open", error, counts=lambda path, *arguments: path == state)

    return plant


def device_is_full(patch: pytest.MonkeyPatch, state: Path) -> None:
    """Where the tensors of the state go to the device."""

    def loaded(*arguments: Any) -> RunState:
        result = load_state(*arguments)

        Injection(patch, torch.Tensor, "to", cuda_error)
        return result

    patch.setattr(pipeline_module, "load_state", loaded)


CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1 bytes"
)
STATE_FAULTS: dict[str, tuple[Fault, type[LowvramError], str]] = {
    "MemoryError": (
        reading_raises(MemoryError),
        OutOfMemoryError,
        r"out of RAM in the resume phase \(MemoryError\).*--resume",
    ),
    "CPU allocator": (
        reading_raises(lambda: RuntimeError(CPU_ALLOCATOR)),
        OutOfMemoryError,
        r"out of RAM in the resume phase",
    ),
    "ENOMEM": (
        disk_raises(no_memory),
        OutOfMemoryError,
        r"out of RAM in the resume phase \(.*Cannot allocate memory\)",
    ),
    "ENOMEM when opened": (
        opening_raises(no_memory),
        OutOfMemoryError,
        r"out of RAM in the resume phase",
    ),
    "device": (
        device_is_full,
        OutOfMemoryError,
        r"out of VRAM in the resume phase \(CUDA out of memory",
    ),
    "EIO": (
        disk_raises(io_error),
        ResumeError,
        r"clip\.mp4\.resume cannot be read \(Input/output error\): it was not changed; "
        r"check the disk",
    ),
    "EIO when opened": (
        opening_raises(io_error),
        ResumeError,
        r"clip\.mp4\.resume cannot be read \(Input/output error\): it was not changed",
    ),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_p16_a_state_that_cannot_be_had_now_is_left_for_another_try(
    interrupted: tuple[Pipeline, Path], expected: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Nobody is told to remove their work; the next try ends in the bits of a run that nothing
    disturbed.
    """
    pipeline, state = interrupted
    content, (plant, kind, said) = state.read_bytes(), STATE_FAULTS[fault]
    with monkeypatch.context() as patch:
        plant(patch, state)
        with pytest.raises(kind, match=said) as failed:
            resumed(pipeline, state)
    assert "remove" not in str(failed.value)
    assert state.read_bytes() == content
    assert resumed(pipeline, state) == expected


def test_p16_a_state_that_cannot_be_had_for_a_moment_is_loaded_after_all(
    interrupted: tuple[Pipeline, Path],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One failure of the disk, then one of memory."""
    pipeline, state = interrupted
    errors = [io_error(), no_memory()]
    Injection(
        monkeypatch,
        disk_module,
        "read_at",
        fails=lambda *arguments: errors.pop(0) if errors else None,
    )
    monkeypatch.setattr(disk_module, "RETRY_DELAYS_S", FAST_RETRIES_S)
    with caplog.at_level(logging.WARNING):
        assert resumed(pipeline, state) == expected
    assert not errors
    assert "out of RAM in the resume phase" in caplog.text
