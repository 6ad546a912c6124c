"""What each format costs in exactness: one expert's velocity against the fp32 yardstick."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lowvram.planner.phases import PlanChoice
from lowvram.store.reader import Store
from tests.helpers.runs import expert_velocities

StoreOf = Callable[[str], Store]


@pytest.mark.parametrize(
    ("format", "cosine"),
    [("bf16", 0.9999), ("int8", 0.9997), ("int8-plain", 0.9997), ("fp8", 0.998)],
)
def test_velocity_is_close_to_fp32(tiny_store: StoreOf, format: str, cosine: float) -> None:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(16, 3, 8, 10, generator=generator)
    features = [torch.randn(9, 256, generator=generator)]
    fp32, lossy = (
        expert_velocities(
            tiny_store(name),
            "low_noise",
            (80, 64),
            9,
            latents,
            500,
            features,
            PlanChoice(64, 2, 0, 0, False),
        )[0]
        for name in ("fp32", format)
    )
    measured = float(torch.nn.functional.cosine_similarity(fp32.flatten(), lossy.flatten(), dim=0))
    assert measured >= cosine
    assert not torch.equal(fp32, lossy)
