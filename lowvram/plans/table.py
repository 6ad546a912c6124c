"""The matrix of `lowvram plan`: plans for sizes and lengths of a video against VRAM budgets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowvram.planner.plan import MemoryPlan


@dataclass(frozen=True)
class Cell:
    """The plan for one size, length and VRAM budget.

    width, height: pixels. plan: None if nothing fits the budget; refusal: then the reason, else "".
    """

    width: int
    height: int
    num_frames: int
    vram_bytes: int
    plan: MemoryPlan | None
    refusal: str

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON values, with peaks, choice and prediction of its plan or the refusal."""
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
    """Cells for one model and RAM budget, with times predicted for `machine`.

    basis: source of the rates, one of `MachineProfile.sources`.
    """

    variant: str
    format: str
    machine: str
    basis: str
    ram_bytes: int
    cells: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        """The matrix as JSON values."""
        facts = {
            name: getattr(self, name)
            for name in ("variant", "format", "machine", "basis", "ram_bytes")
        }
        return facts | {"times_are": "predicted", "cells": [cell.to_dict() for cell in self.cells]}
