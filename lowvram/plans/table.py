"""What fits, and how long it is predicted to take: sizes and lengths of a video against budgets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowvram.planner.plan import MemoryPlan


@dataclass(frozen=True)
class Cell:
    """One size, length and VRAM budget: the plan, or why there is none."""

    width: int
    height: int
    num_frames: int
    vram_bytes: int
    plan: MemoryPlan | None
    refusal: str

    def to_dict(self) -> dict[str, Any]:
        """Sizes, whether it fits, and of the plan what a table shows."""
        facts = {
            "width": self.width,
            "height": self.height,
            "frames": self.num_frames,
            "vram_bytes": self.vram_bytes,
            "fits": bool(self.plan),
        }
        if self.plan is None:
            return facts | {"refusal": self.refusal}
        plan = self.plan
        peaks = {
            "peak_vram_bytes": plan.peak_vram_bytes,
            "peak_ram_bytes": plan.peak_ram_bytes,
            "choice": asdict(plan.choice),
        }
        return (
            facts | peaks | {"prediction": plan.prediction.to_dict() if plan.prediction else None}
        )


@dataclass(frozen=True)
class Matrix:
    """What fits: sizes and lengths against VRAM budgets, with times that are predictions for
    `machine`.
    """

    variant: str
    format: str
    machine: str
    basis: str
    ram_bytes: int
    cells: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        facts = {
            name: getattr(self, name)
            for name in ("variant", "format", "machine", "basis", "ram_bytes")
        }
        return facts | {"times_are": "predicted", "cells": [cell.to_dict() for cell in self.cells]}
