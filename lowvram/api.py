"""The Python interface: `lowvram.load`, `lowvram.quantize`, `lowvram.plan`."""

from __future__ import annotations

from lowvram_quantize.convert import quantize

from lowvram.pipeline import Pipeline, Video, load
from lowvram.plans.api import plan, plan_matrix

__all__ = ["Pipeline", "Video", "load", "plan", "plan_matrix", "quantize"]
