"""Places where memory ends in the middle of a phase, with tensors in hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lowvram import pipeline as pipeline_module
from lowvram.models import wan
from lowvram.models.umt5 import TextEncoder
from lowvram.models.vae import WanVAE
from lowvram.pipeline import Pipeline
from lowvram.request import Request
from lowvram.sampling import recovery, state
from lowvram.sampling.denoise import block_schedule
from lowvram.sampling.schedule import make_schedule
from tests.faults.attempts import Attempts
from tests.faults.inject import Injection
from tests.faults.runs import TILED, request
from tests.helpers.staged import StagedPipeline, StagedTransport

Inject = Callable[
    [pytest.MonkeyPatch, StagedPipeline, Attempts, Callable[[], Exception], bool], None
]


def in_text_block(number: int) -> Inject:
    """While the block's result is in hand; each of two blocks runs once for each of two prompts."""

    def inject(
        patch: pytest.MonkeyPatch,
        pipeline: StagedPipeline,
        attempts: Attempts,
        error: Callable[[], Exception],
        ever: bool,
    ) -> None:
        Injection(
            patch,
            TextEncoder,
            "_run_block",
            lambda: attempts.fault(error),
            lambda call, *arguments: call == number - 1 or (ever and call >= number),
            after=True,
        )

    return inject


def in_second_expert(
    patch: pytest.MonkeyPatch,
    pipeline: StagedPipeline,
    attempts: Attempts,
    error: Callable[[], Exception],
    ever: bool,
) -> None:
    """Where its text embedding is read: the first expert and this one's time are in hand."""
    real, calls = wan.condition, [0]

    def condition(read: wan.ReadTensor, *arguments: Any) -> wan.Conditioning:
        calls[0] += 1
        failing = calls[0] == 2 or (ever and calls[0] % 2 == 0)

        def reading(name: str) -> torch.Tensor:
            if failing and name == "text_embedding.2.weight":
                raise attempts.fault(error)
            return read(name)

        return real(reading, *arguments)

    patch.setattr(pipeline_module, "condition", condition)


def in_third_tile(
    patch: pytest.MonkeyPatch,
    pipeline: StagedPipeline,
    attempts: Attempts,
    error: Callable[[], Exception],
    ever: bool,
) -> None:
    """Behind its first latent frame: weights, caches and the row of tiles are in hand."""
    real, calls = WanVAE._decode_tile, [0]

    def decode_tile(self: WanVAE, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        calls[0] += 1
        failing = calls[0] == 3 or (ever and calls[0] % 3 == 0)
        for pixels in real(self, latents):
            yield pixels
            if failing:
                raise attempts.fault(error)

    patch.setattr(WanVAE, "_decode_tile", decode_tile)


def in_worker(hop: str) -> Inject:
    """In the worker's thread, at the first block of the second expert; when that comes back for
    ever, at the first of every attempt.
    """

    def inject(
        patch: pytest.MonkeyPatch,
        pipeline: StagedPipeline,
        attempts: Attempts,
        error: Callable[[], Exception],
        ever: bool,
    ) -> None:
        asked = request(pipeline)
        blocks = block_schedule(
            make_schedule("unipc", asked.steps, asked.shift), asked, 2, joint=False, first_step=0
        )
        switch = next(number for number, (expert, _) in enumerate(blocks) if expert == "low_noise")
        assert 0 < switch < len(blocks) - 1
        text = [2]  # blocks of the text encoder come first

        def counts(transport: StagedTransport, *arguments: Any) -> bool:
            if hop == "copy" and text[0]:
                text[0] -= 1
                return False
            return True

        def fails(call: int, transport: StagedTransport, *arguments: Any) -> bool:
            done = transport.__dict__.setdefault("carried", 0)
            transport.__dict__["carried"] += 1
            return (attempts.faults == 0 and done == switch) or (ever and attempts.faults > 0)

        Injection(patch, StagedTransport, hop, lambda: attempts.fault(error), fails, counts=counts)

    return inject


def in_save(
    patch: pytest.MonkeyPatch,
    pipeline: StagedPipeline,
    attempts: Attempts,
    error: Callable[[], Exception],
    ever: bool,
) -> None:
    """While the second step's state is made into a file's bytes, which are in hand."""
    Injection(
        patch,
        state,
        "save",
        lambda: attempts.fault(error),
        lambda call, *arguments: call == 1 or (ever and call > 1),
        after=True,
    )


TEXT, CONDITION, DECODE = (
    (Pipeline, name) for name in ("_encode_prompts", "_condition", "_decode")
)
STAGING = "the staging at the expert switch"
LOOP, ATTEMPT = (pipeline_module, "denoise_within_budgets"), (recovery, "_attempt")
# Where memory ends: the injection, the phase's entry, the entry of what is tried again, the phase
# as errors name it, its name in the plan.
PLACES: dict[str, tuple[Inject, tuple[Any, str], tuple[Any, str], str, str]] = {
    **{
        f"text block {number}": (in_text_block(number), TEXT, TEXT, "the text phase", "text")
        for number in (1, 2, 3, 4)
    },
    "the second expert's conditioning": (
        in_second_expert,
        CONDITION,
        CONDITION,
        "the conditioning phase",
        "conditioning",
    ),
    "the copy at the expert switch": (in_worker("copy"), LOOP, ATTEMPT, r"step \d of 3", "denoise"),
    STAGING: (in_worker("stage"), LOOP, ATTEMPT, r"step \d of 3", "denoise"),
    "the saved state": (
        in_save,
        LOOP,
        (pipeline_module, "save_state"),
        "saving step 2 of 3",
        "denoise",
    ),
    "the third tile": (in_third_tile, DECODE, DECODE, "the decode phase", "decode"),
}


def asked_at(place: str, pipeline: Pipeline) -> Request:
    return request(pipeline, **(TILED if place == "the third tile" else {}))
