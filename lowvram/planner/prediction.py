"""The predicted times of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """Seconds that a plan is predicted to take, by phase and in parts. Writing the file is not
    predicted.

    basis: whether the rates behind it were "measured" on this machine, are "predicted" for a card
    or come from the "table" of cards.
    block_s: computing one block for one guidance branch in the plan's chunks; step_s: a denoising
    step between the first and the last of its expert; compute_step_s: what computing alone takes of
    it, as if every block were there when it is wanted, and compute_s that of all steps;
    resident_step_s: the step that a budget without limit gives, every block resident and chunks as
    long as they get; switch_stall_s: what the expert switch adds. The bytes are those of the
    denoising phase, by hop.
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
        return {
            "text": self.text_s,
            "conditioning": self.conditioning_s,
            "denoise": self.denoise_s,
            "decode": self.decode_s,
        }

    @property
    def video_s(self) -> float:
        return sum(self.phase_s.values())

    @property
    def overhead(self) -> float:
        """What the budgets cost: how much longer a step takes than `resident_step_s`, as a share. 0
        where streaming is hidden and chunks are long; what waiting alone costs is `step_s /
        compute_step_s - 1`.
        """
        return max(0.0, self.step_s / self.resident_step_s - 1)

    def to_dict(self) -> dict[str, Any]:
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
