"""Which expert works when, what guidance does, and which blocks are visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowvram.errors import UsageError
from lowvram.request import Request
from lowvram.sampling.denoise import block_schedule, guided
from lowvram.sampling.schedule import make_schedule
from lowvram.store.reader import Store
from tests.helpers.runs import digest, pipeline_of, request_of

StoreOf = Callable[[str], Store]


def test_the_official_defaults_visit_26_steps_of_the_high_and_14_of_the_low_expert() -> None:
    request = Request("a circle")
    visits = block_schedule(make_schedule("unipc", 40, 12.0), request, 40, joint=True, first_step=0)
    assert visits[: 26 * 40] == [("high_noise", index) for _ in range(26) for index in range(40)]
    assert visits[26 * 40 :] == [("low_noise", index) for _ in range(14) for index in range(40)]
    apart = block_schedule(
        make_schedule("unipc", 40, 12.0), request, 40, joint=False, first_step=39
    )
    assert apart == [("low_noise", index) for _ in range(2) for index in range(40)]


def test_guidance_one_runs_the_positive_prompt_alone() -> None:
    request = Request("a circle", guidance_high=1.0, guidance_low=3.0)
    assert [request.branches(expert) for expert in ("high_noise", "low_noise")] == [1, 2]
    positive, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided([positive], 1.0) is positive
    assert guided([positive, negative], 4.0).item() == 9.0


def test_each_expert_has_its_own_guidance(tiny_store: StoreOf) -> None:
    """Changing the guidance of one expert changes the video; of an expert that never works,
    nothing.
    """
    pipeline = pipeline_of(tiny_store("int8"))
    steps: dict[str, Any] = {
        "steps": 2,
        "shift": 1.0,
    }  # timesteps 999 and 499: one step for each expert
    base = digest(pipeline.generate(request_of(pipeline, **steps)).frames)
    changes: tuple[dict[str, Any], ...] = ({"guidance_high": 1.0}, {"guidance_low": 1.0})
    for change in changes:
        assert digest(pipeline.generate(request_of(pipeline, **steps, **change)).frames) != base
    alone: dict[str, Any] = {"steps": 1, "shift": 1.0}  # timestep 999 only
    frames = [
        digest(pipeline.generate(request_of(pipeline, **alone, guidance_low=scale)).frames)
        for scale in (1.0, 7.0)
    ]
    assert frames[0] == frames[1]


def test_the_prompt_steers_the_video(tiny_store: StoreOf) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    texts = ("a red circle", "a blue square moves left")
    assert (
        len({digest(pipeline.generate(request_of(pipeline, text)).frames) for text in texts}) == 2
    )


def test_another_negative_prompt_gives_another_video(tiny_store: StoreOf) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    digests = {
        digest(pipeline.generate(request_of(pipeline, negative_prompt=text)).frames)
        for text in ("blue", "red square")
    }
    assert len(digests) == 2


def test_unknown_settings_are_named(tiny_store: StoreOf) -> None:
    from lowvram.errors import UsageError

    with pytest.raises(UsageError, match="unknown setting stepz"):
        pipeline_of(tiny_store("int8")).request("a circle", stepz=3)


@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_activations_at_the_limit_of_fp16_are_reported_once_per_expert(
    tiny_store: StoreOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    activations: str,
) -> None:
    monkeypatch.setenv("LOWVRAM_ACTIVATIONS", activations)
    pipeline = pipeline_of(tiny_store("int8"))
    request = request_of(pipeline, steps=4, shift=1.0)
    pipeline.generate(request)
    assert "limit of fp16" not in caplog.text
    monkeypatch.setattr("lowvram.sampling.denoise.FLOAT16_MAX", 1e-3)
    pipeline.generate(request)
    warned = [record for record in caplog.messages if "LOWVRAM_ACTIVATIONS=bf16" in record]
    assert len(warned) == (2 if activations == "fp16" else 0)


def test_an_unknown_dtype_of_activations_is_refused(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_ACTIVATIONS", "int8")
    pipeline = pipeline_of(tiny_store("int8"))
    with pytest.raises(UsageError, match="LOWVRAM_ACTIVATIONS=int8: use one of fp16, bf16"):
        pipeline.generate(request_of(pipeline))
