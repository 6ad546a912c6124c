"""The advice of out-of-memory errors fits the phase and what is saved (promise 16)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram import pipeline as pipeline_module
from lowvram.errors import OutOfMemoryError
from lowvram.models import wan
from lowvram.models.umt5 import TextEncoder
from lowvram.models.vae import WanVAE
from lowvram.request import Request
from lowvram.store.reader import Store
from lowvram.units import format_memory
from tests.faults.inject import Injection, always, cuda_error, first, python_error
from tests.faults.runs import CHOICE, last_fallback, needs, request
from tests.helpers.runs import digest, plan_of
from tests.helpers.staged import StagedPipeline


def fail_always(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    owner: dict[str, tuple[Any, str]] = {
        "text": (TextEncoder, "_run_block"),
        "conditioning": (pipeline_module, "condition"),
        "decode": (WanVAE, "_decode_tile"),
    }
    Injection(monkeypatch, *owner.get(phase, (wan.WanTransformer, "_run_block")), cuda_error)


@pytest.fixture(scope="module")
def one_step(store: Store, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of a run that was stopped behind its first step."""
    pipeline, file = StagedPipeline(store), tmp_path_factory.mktemp("stopped") / "state"
    asked = request(pipeline)

    def stop(event: Any) -> None:
        if event.phase == "denoise" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(
            asked, plan=plan_of(pipeline, asked, CHOICE), state_file=file, listener=stop
        )
    return file.read_bytes()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("phase", ["text", "conditioning", "denoise", "decode"])
def test_p16_the_advice_fits_the_phase_and_what_is_saved(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    one_step: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    phase: str,
    saved: bool,
) -> None:
    asked, file = request(pipeline), tmp_path / "clip.mp4.resume"
    plan = plan_of(pipeline, asked, CHOICE)
    if saved:
        file.write_bytes(one_step)
    elif phase != "decode":
        file.write_bytes(b"what another run has left")
    kept = file if saved or phase != "decode" else None
    with monkeypatch.context() as patch:
        fail_always(patch, phase)
        with pytest.raises(OutOfMemoryError) as failed:
            pipeline.generate(asked, plan=plan, state_file=kept, resume=saved)
    said = str(failed.value)
    assert "\n" not in said
    ended = last_fallback(pipeline, asked, plan) if phase == "denoise" else plan
    assert f"it needs {format_memory(needs(ended, phase))} of VRAM" in said
    assert ("and go on with --resume" in said, "and run it again" in said) == (saved, not saved), (
        said
    )
    assert ("--size" in said) is (phase in ("denoise", "decode")), (
        "where a smaller video would help"
    )
    assert ("begin anew" in said) is (saved and phase in ("denoise", "decode"))
    assert ("has nothing that it could give up" in said) is (phase == "conditioning")
    if saved and phase in ("denoise", "decode"):
        assert digest(
            pipeline.generate(asked, plan=plan, state_file=file, resume=True).frames
        ) == expected(asked)


def test_p16_a_failed_decode_may_be_resumed_where_steps_were_saved(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The steps of this very run, not of one before it."""
    asked = request(pipeline, steps=1)
    fail_always(monkeypatch, "decode")
    with pytest.raises(OutOfMemoryError, match="and go on with --resume"):
        pipeline.generate(
            asked, plan=plan_of(pipeline, asked, CHOICE), state_file=tmp_path / "state"
        )


def test_p16_the_noise_is_drawn_again(
    pipeline: StagedPipeline, expected: Callable[[Request], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(pipeline)
    plan, whole = plan_of(pipeline, asked, CHOICE), expected(asked)
    draws = Injection(monkeypatch, pipeline_module, "draw_noise", python_error, first(1))
    assert digest(pipeline.generate(asked, plan=plan).frames) == whole
    draws.fails, draws.calls = always, 0
    with pytest.raises(
        OutOfMemoryError,
        match=r"^out of RAM in the noise phase \(MemoryError\): it needs less RAM than any "
        r"phase .* run it again$",
    ):
        pipeline.generate(asked, plan=plan)
    assert draws.calls == 2
