"""A disk that never answers: an error that names file and block after a while, Ctrl-C at once, and
a process that ends (promise 16).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.errors import CheckpointError
from lowvram.files import read as disk
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import PlanChoice
from lowvram.store.reader import Store
from lowvram.streaming.streamer import Hops
from tests.helpers.hanging import HangingReads
from tests.helpers.runs import pipeline_of, plan_of, request_of
from tests.helpers.staged import StagedPipeline

StoreOf = Callable[[str], Store]
CHOICE = PlanChoice(64, 1, 0, 1, False, pinned_blocks=1)


def hanging_disk(
    monkeypatch: pytest.MonkeyPatch, store: Store, component: str, block: int
) -> HangingReads:
    """Reads past the middle of one block do not come back before `release`."""
    start, nbytes = store.files[component].blocks[block]
    middle, last = start + nbytes // 2, start + nbytes
    return HangingReads(
        monkeypatch,
        lambda file, offset, end: file.path.stem == component and offset < last and end > middle,
    )


def generate(pipeline: Pipeline) -> None:
    request = request_of(pipeline, steps=2, shift=5.0)
    pipeline.generate(request, plan=plan_of(pipeline, request, CHOICE))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("component", ["text_encoder", "low_noise"])
def test_p16_a_block_that_never_comes_is_named(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch, component: str, staged: bool
) -> None:
    store = tiny_store("int8")
    pipeline = StagedPipeline(store) if staged else pipeline_of(store)
    monkeypatch.setattr(disk, "HANGING_READ_S", 1.0)
    hanging = hanging_disk(monkeypatch, store, component, 1)
    said = (
        rf"{component}\.safetensors: block 1 cannot be read: the disk gave no byte for 1 "
        rf"s: check the disk"
    )
    with pytest.raises(CheckpointError, match=said):
        generate(pipeline)
    hanging.release()


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send to oneself")
@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("staged", [False, True])
def test_p20_ctrl_c_is_heard_while_the_disk_hangs(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch, staged: bool
) -> None:
    store = tiny_store("int8")
    pipeline = StagedPipeline(store) if staged else pipeline_of(store)
    monkeypatch.setattr(disk, "STOP_GRACE_S", 0.5)
    hanging = hanging_disk(monkeypatch, store, "high_noise", 1)
    pressed: list[float] = []

    def press() -> None:
        if hanging.begun.wait(20):
            time.sleep(0.3)  # until the thread that computes waits for the block
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline)
    heard = time.monotonic()
    presser.join()
    assert heard - pressed[0] < 3
    hanging.release()


def test_a_wait_ends_now_and_then_so_that_ctrl_c_is_heard_on_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hops, waits = Hops(), list[float | None]()
    real = threading.Condition.wait

    def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        if condition is hops._changed:
            waits.append(timeout)
        return real(condition, timeout)

    monkeypatch.setattr(threading.Condition, "wait", wait)
    timer = threading.Timer(0.1, hops.done, ("disk", 7, "event"))
    timer.start()
    assert hops.wait("disk", 7) == "event"
    timer.join()
    assert waits
    assert all(timeout is not None and timeout <= 1 for timeout in waits)


HANGS = """
import sys, threading, torch
from pathlib import Path
from lowvram.store.reader import open_store
from lowvram.streaming.block_file import BlockFile
from tests.helpers.runs import pipeline_of, request_of

def hang(file, target, offset):
    print("hangs", flush=True)
    threading.Event().wait()

torch.set_num_threads(1)
BlockFile._pread = hang
pipeline = pipeline_of(open_store(Path(sys.argv[1])))
pipeline.generate(request_of(pipeline, steps=1))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send to a process")
def test_p20_a_read_that_never_returns_does_not_keep_the_process(tiny_store: StoreOf) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(tiny_store("int8").path)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
