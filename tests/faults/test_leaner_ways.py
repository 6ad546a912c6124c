"""Phases with a leaner way take it, with the same bits (promise 16)."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowvram.errors import OutOfMemoryError
from lowvram.planner.phases import PHASES
from lowvram.request import Request
from lowvram.store.reader import StoreFile
from tests.faults.inject import Allocator, cuda_error
from tests.faults.runs import CHOICE, TILED, request
from tests.helpers.runs import digest, plan_of
from tests.helpers.staged import StagedPipeline


@pytest.mark.parametrize("slots", [1, 0])
def test_p16_the_text_phase_does_with_one_slot(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slots: int,
) -> None:
    """A machine that has room for one buffer of each kind, or for none."""
    asked = request(pipeline)
    plan = plan_of(pipeline, asked, CHOICE)
    assert plan.text_slot_bytes != plan.slot_bytes
    memory = Allocator(
        monkeypatch,
        cuda_error,
        lambda number, nbytes: (
            nbytes == plan.text_slot_bytes and memory.living(nbytes) >= 2 * slots
        ),
    )
    if slots:
        with caplog.at_level(logging.WARNING):
            assert digest(pipeline.generate(asked, plan=plan).frames) == expected(asked)
        assert f"trying it with {PHASES['text'].leaner}" in caplog.text
    else:
        with pytest.raises(
            OutOfMemoryError,
            match=re.escape(f"with {PHASES['text'].leaner} it still found too little"),
        ):
            pipeline.generate(asked, plan=plan)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_p16_the_decoder_does_without_most_of_its_weights(
    pipeline: StagedPipeline,
    expected: Callable[[Request], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: float,
) -> None:
    """A machine that has room for half of them at a time, or for none."""
    asked = request(pipeline, **TILED)
    plan, whole = plan_of(pipeline, asked, CHOICE), expected(asked)
    file, alive, real = pipeline.store.files["vae"], [0], StoreFile.read
    total = sum(
        real(file, name).nbytes for name in file.rest if name.startswith(("decoder.", "conv2."))
    )

    def read(self: StoreFile, name: str, *arguments: Any, **named: Any) -> torch.Tensor:
        weight = real(self, name, *arguments, **named)
        if self is file:
            if alive[0] + weight.nbytes > share * total:
                raise cuda_error()
            alive[0] += weight.nbytes
            weakref.finalize(weight.untyped_storage(), free, weight.nbytes)
        return weight

    def free(nbytes: int) -> None:
        alive[0] -= nbytes

    monkeypatch.setattr(StoreFile, "read", read)
    if share:
        with caplog.at_level(logging.WARNING):
            assert digest(pipeline.generate(asked, plan=plan).frames) == whole
        assert f"trying it with {PHASES['decode'].leaner}" in caplog.text
    else:
        with pytest.raises(
            OutOfMemoryError,
            match=re.escape(f"with {PHASES['decode'].leaner} it still found too little"),
        ):
            pipeline.generate(asked, plan=plan)
    assert alive == [0]
