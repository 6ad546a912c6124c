"""The predicted times of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a plan, by phase and in parts, without writing the file.

    basis: rates "measured" on this machine, "predicted" for a card, or from the "table" of cards.
    block_s: one block for one guidance branch in the plan's chunks; step_s: a denoising step,
    neither the first nor the last of its expert; compute_step_s and compute_s: computing alone, of
    a step and of all steps; resident_step_s: a step with all blocks resident and the longest
    chunks; switch_stall_s: added by the expert switch. The byte counts are those of the denoising
    phase, by hop.
    """

    machine: str
    basis: str
    block_s: float
    step_s: float
    compute_step_s: float
    compute_s: float
    resident_step_s: float
    switch_stall_s: float
    text_s: float
    conditioning_s: float
    denoise_s: float
    decode_s: float
    read_bytes: int
    host_copy_bytes: int
    link_bytes: int

    @property
    def phase_s(self) -> dict[str, float]:
        """Seconds by phase."""
        return {
            "text": self.text_s,
            "conditioning": self.conditioning_s,
            "denoise": self.denoise_s,
            "decode": self.decode_s,
        }

    @property
    def video_s(self) -> float:
        """Seconds of all phases."""
        return sum(self.phase_s.values())

    @property
    def overhead(self) -> float:
        """Cost of the budgets: by which share a step is longer than `resident_step_s`. 0 if
        streaming is hidden and chunks are long. Waiting alone costs `step_s / compute_step_s -
        1`.
        """
        return max(0.0, self.step_s / self.resident_step_s - 1)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values."""
        phases = {f"{name}_s": getattr(self, f"{name}_s") for name in self.phase_s}
        rest = (
            "machine",
            "basis",
            "block_s",
            "step_s",
            "compute_step_s",
            "compute_s",
            "resident_step_s",
            "switch_stall_s",
            "read_bytes",
            "host_copy_bytes",
            "link_bytes",
        )
        return (
            {name: getattr(self, name) for name in rest}
            | phases
            | {"video_s": self.video_s, "overhead": self.overhead}
        )
