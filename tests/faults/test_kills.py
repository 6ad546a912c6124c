"""Promises 1, 20 and 27: killed at any moment, alone or with a second run started meanwhile, a run
loses no finished step and ends in the same bytes.

`LOWVRAM_KILLS=200` kills more often.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from lowvram_quantize.convert import quantize

from lowvram.cli.app import app
from lowvram.errors import OutputError
from lowvram.files.lock import LOCK_NAME
from lowvram.files.output import RESUME
from lowvram.store.manifest import MANIFEST_NAME, STAGING_NAME
from lowvram.store.reader import Store
from tests.helpers.checkpoints import tiny_config, write_official

KILLS = int(os.environ.get("LOWVRAM_KILLS", "8"))
StoreOf = Callable[[str], Store]
Work = Callable[[], Any]
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.slow,
]
FINISHED, REFUSED, FAILED = 0, 3, 1


def start(work: Work) -> int:
    """Run `work` in a forked process: it ends with `REFUSED` where another run has the output."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    with contextlib.suppress(BaseException):
        torch.set_num_threads(1)  # fork does not copy the parent's threads
        try:
            work()
            code = FINISHED
        except OutputError as error:
            code = REFUSED if "is being written by process" in str(error) else FAILED
    os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_often(work: Callable[[], Work], whole_s: float, finished: Callable[[], bool]) -> list[int]:
    """Start `work` and kill it at a moment drawn anew, every second time with another one beside
    it, until it was killed `KILLS` times or has finished; exit codes of those beside it.
    """
    rng, codes = random.Random(), []
    for number in range(KILLS):
        if finished():
            break
        first = start(work())
        time.sleep(rng.uniform(0, whole_s))
        second = start(work()) if number % 2 else None
        if second is not None:
            time.sleep(rng.uniform(0, whole_s / 4))
        os.kill(first, signal.SIGKILL)
        wait(first)
        if second is not None:
            codes.append(wait(second))
    return codes


def seconds_of(work: Work) -> float:
    began = time.monotonic()
    assert wait(start(work)) == FINISHED
    return time.monotonic() - began


def test_p01_a_quantizer_killed_often_ends_in_the_same_bytes(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", tiny_config(num_layers=1))

    def hashes(model: Path) -> dict[str, str]:
        files = [path for path in model.iterdir() if path.is_file() and path.name != LOCK_NAME]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    whole_s = seconds_of(partial(quantize, source, tmp_path / "whole", threads=1))
    whole = hashes(tmp_path / "whole")
    kills = 0
    while kills < KILLS:
        model = tmp_path / f"model-{kills}"

        def work(model: Path = model) -> Work:
            return partial(quantize, source, model, threads=1, resume=True)

        codes = kill_often(work, whole_s, (model / MANIFEST_NAME).exists)
        assert set(codes) <= {FINISHED, REFUSED}
        kills += max(1, 2 * len(codes))
        quantize(source, model, resume=True)
        assert hashes(model) == whole
        assert not (model / STAGING_NAME).exists()


def test_p20_a_generation_killed_often_ends_in_the_same_bytes(
    tiny_store: StoreOf, tmp_path: Path
) -> None:
    model = tiny_store("int8").path

    def generation(out: Path) -> Work:
        arguments = ["generate", str(model), "-p", "a ball", "--size", "64x64", "--frames", "5"]
        arguments += ["--steps", "12", "--device", "cpu", "--out", str(out)]
        resumed = ["--resume"] if out.with_name(out.name + RESUME).exists() else []

        def work() -> None:
            # as the command line, but that its errors reach `start`
            app(["--debug", *arguments, *resumed], standalone_mode=False)

        return work

    whole = tmp_path / "whole.mp4"
    whole_s = seconds_of(generation(whole))
    kills = 0
    while kills < KILLS:
        folder = tmp_path / str(kills)
        folder.mkdir()
        out = folder / "clip.mp4"
        codes = kill_often(lambda out=out: generation(out), whole_s, out.exists)  # type: ignore[misc]
        assert set(codes) <= {FINISHED, REFUSED, FAILED}
        kills += max(1, 2 * len(codes))
        if not out.exists():
            assert wait(start(generation(out))) == FINISHED
        assert out.read_bytes() == whole.read_bytes()
        left = {path.name for path in folder.iterdir()} - {"clip.mp4"}
        assert not [name for name in left if not name.endswith(LOCK_NAME)]
