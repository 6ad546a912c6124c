"""Tensors of a failed attempt are dead before the next one, and the video stays the same; without
memory to come, one line says what the phase needs and what to do (promise 16).
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lowvram import pipeline as pipeline_module
from lowvram.cli.app import app
from lowvram.request import Request
from lowvram.store.reader import Store
from lowvram.units import format_memory
from tests.faults.attempts import Attempts, Living
from tests.faults.inject import cuda_error, python_error
from tests.faults.places import ATTEMPT, LOOP, PLACES, STAGING, asked_at, in_worker
from tests.faults.runs import CHOICE, last_fallback, needs, request
from tests.helpers.runs import digest, plan_of
from tests.helpers.staged import StagedPipeline
from tests.helpers.threads import lowvram_threads


@pytest.mark.parametrize(
    ("place", "error"), list(zip(PLACES, cycle([cuda_error, python_error]), strict=False))
)
def test_p16_what_an_attempt_held_is_dead_before_the_next_one(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: str,
    error: Callable[[], Exception],
) -> None:
    inject, phase, again, _, _ = PLACES[place]
    asked = asked_at(place, pipeline)
    plan, whole = plan_of(pipeline, asked, CHOICE), expected(asked)
    told: list[int] = []
    with Living() as living, caplog.at_level(logging.WARNING):
        attempts = Attempts(monkeypatch, living, phase, again)
        inject(monkeypatch, pipeline, attempts, error, False)
        video = pipeline.generate(
            asked,
            plan=plan,
            state_file=tmp_path / "state",
            listener=lambda e: told.append(e.done) if e.phase == "denoise" else None,
        )
    assert digest(video.frames) == whole
    assert attempts.faults == 1
    assert attempts.held[0] > 10_000
    assert attempts.left == [[]]
    assert told == list(range(asked.steps + 1)), "every step is told once"
    assert len([record for record in caplog.records if "out of" in record.getMessage()]) == 1
    assert not lowvram_threads()


@pytest.mark.parametrize("place", [place for place in PLACES if place != STAGING])
def test_p16_memory_that_never_comes_back_is_a_clear_error(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """Through the command line: one line that names the phase, what it needs of the plan, and what
    can be done; no video.
    """
    inject, phase, again, named, name = PLACES[place]
    asked = asked_at(place, pipeline)
    plan, out = plan_of(pipeline, asked, CHOICE), tmp_path / "clip.mp4"
    monkeypatch.setattr(pipeline_module, "load", lambda *_: pipeline)
    monkeypatch.setattr(pipeline, "request", lambda *_, **__: asked)
    monkeypatch.setattr(pipeline, "plan", lambda *_: plan)
    with Living() as living:
        attempts = Attempts(monkeypatch, living, phase, again)
        inject(monkeypatch, pipeline, attempts, cuda_error, True)
        result = CliRunner().invoke(
            app, ["generate", str(tmp_path), "--prompt", "a", "--out", str(out)]
        )
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: out of VRAM in {named} \(CUDA out of memory", line), line
    assert "Traceback" not in result.output
    ended = last_fallback(pipeline, asked, plan) if name == "denoise" else plan
    assert f"needs {format_memory(needs(ended, name))} of VRAM" in line
    assert ("--resume" in line) is (tmp_path / "clip.mp4.resume").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["clip.mp4.resume"])
    assert (
        attempts.faults
        == {"text": 3, "decode": 3, "conditioning": 2}.get(name, attempts.faults)
        <= 8
    )
    assert attempts.left == [[]] * (attempts.faults - 1)
    assert not lowvram_threads()


def test_p16_staging_that_never_works_again_ends_in_the_video(
    pipeline: StagedPipeline, expected: Callable[[Request], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallbacks gives up the blocks that pass through it: the disk is read into the staging
    buffers themselves.
    """
    asked = request(pipeline)
    whole = expected(asked)
    with Living() as living:
        attempts = Attempts(monkeypatch, living, LOOP, ATTEMPT)
        in_worker("stage")(monkeypatch, pipeline, attempts, cuda_error, True)
        video = pipeline.generate(asked, plan=plan_of(pipeline, asked, CHOICE))
    assert digest(video.frames) == whole
    assert attempts.left == [[], []]


ENDLESS = """
import torch
from lowvram.cli.app import app
from tests.helpers import staged
from lowvram import pipeline

def refuse(*_):
    raise torch.OutOfMemoryError("CUDA out of memory: for ever")

pipeline.load = lambda path, *_: staged.StagedPipeline(pipeline.open_store(pipeline.Path(path)))
staged.StagedTransport.copy = refuse
app()
"""


def test_p16_a_process_whose_workers_find_no_memory_ends(store: Store, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    clip = ["--size", "64x64", "--frames", "5", "--steps", "2", "--out", str(tmp_path / "clip.mp4")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ENDLESS,
            "generate",
            str(store.path),
            "--prompt",
            "a",
            "--no-prompt-cache",
            *clip,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "error: out of VRAM in the text phase" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_view_that_was_closed_holds_no_slot(store: Store) -> None:
    from lowvram.streaming.block import BlockView

    slot = torch.zeros(64, dtype=torch.uint8)
    gone = weakref.ref(slot.untyped_storage())
    view = BlockView(slot, {"a": (torch.uint8, (4,), 0)})
    del slot
    view.close()
    assert gone() is None
    with pytest.raises(RuntimeError):
        view["a"]
