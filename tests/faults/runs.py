"""The runs of these tests: one plan, small requests, and the peaks of their plans."""

from __future__ import annotations

from typing import Any

from lowvram.pipeline import Pipeline
from lowvram.planner.fallback import VRAM, FallbackPlans
from lowvram.planner.phases import PlanChoice
from lowvram.planner.plan import MemoryPlan
from lowvram.request import Request
from tests.helpers.runs import request_of

# One slot, no block kept on the device: every visit is a copy, and one through staging, since no
# cached block is page-locked.
CHOICE = PlanChoice(64, 1, 0, 2, False)


TILED = {"width": 464, "height": 32, "num_frames": 5, "steps": 1}  # three tiles


def request(pipeline: Pipeline, **changes: Any) -> Request:
    usual: dict[str, Any] = {"shift": 8.0, "num_frames": 5, "negative_prompt": "blue"}
    return request_of(pipeline, **(usual | changes))


def needs(plan: MemoryPlan, phase: str, budget: str = "vram_bytes") -> int:
    (nbytes,) = (getattr(peak, budget) for peak in plan.phases if peak.phase == phase)
    return int(nbytes)


def last_fallback(pipeline: Pipeline, request: Request, plan: MemoryPlan) -> MemoryPlan:
    fallbacks = FallbackPlans(plan, pipeline.new_run(request, plan).describe, shared=True)
    while fallbacks.down(VRAM):
        pass
    return fallbacks.plan
