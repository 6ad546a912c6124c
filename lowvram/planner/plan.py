"""A run's memory plan: the peaks of all phases that follow from a choice. No torch, no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowvram.planner.phases import PHASES, Host, PlanChoice, PlanInputs
from lowvram.planner.prediction import Prediction
from lowvram.planner.vae import vae_tile_pixels
from lowvram.planner.workspace import READ_SLACK_BYTES, Workspace, dit_workspace
from lowvram.request import Workload
from lowvram.store.layout import component_layout
from lowvram.variants import EXPERTS

CHUNK_TOKENS = (8192, 4096, 2048, 1024, 512, 256, 128, 64)
STAGING_BUFFERS = 2


@dataclass(frozen=True)
class PhasePeak:
    """Peak bytes of one phase of a run."""

    phase: str
    vram_bytes: int
    ram_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one run.

    slot_bytes: a block with the slack for aligned reads; items: VRAM of the denoising phase by
    purpose.
    """

    workload: Workload
    choice: PlanChoice
    num_blocks: int
    slot_bytes: int
    text_slot_bytes: int
    staging_buffers: int
    vae_tile_pixels: int
    workspace: Workspace
    items: dict[str, int]
    phases: tuple[PhasePeak, ...]
    prediction: Prediction | None = None

    @property
    def peak_vram_bytes(self) -> int:
        """The largest VRAM peak of any phase."""
        return max(phase.vram_bytes for phase in self.phases)

    @property
    def peak_ram_bytes(self) -> int:
        """The largest RAM peak of any phase."""
        return max(phase.ram_bytes for phase in self.phases)

    def peak(self, phase: str) -> PhasePeak:
        """The peak of a planned phase, by its name."""
        return next(peak for peak in self.phases if peak.phase == phase)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        workload = self.workload
        data: dict[str, Any] = {
            "variant": workload.config.variant,
            "format": workload.format.name,
            "width": workload.width,
            "height": workload.height,
            "num_frames": workload.num_frames,
            "num_tokens": workload.num_tokens,
            "choice": asdict(self.choice),
        }
        for name in (
            "num_blocks",
            "slot_bytes",
            "text_slot_bytes",
            "staging_buffers",
            "vae_tile_pixels",
            "items",
        ):
            data[name] = getattr(self, name)
        return data | {
            "phases": tuple(asdict(phase) for phase in self.phases),
            "prediction": self.prediction.to_dict() if self.prediction else None,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
        }


def describe_plan(workload: Workload, choice: PlanChoice, host: Host) -> MemoryPlan:
    """The plan of a choice, whatever its memory."""
    config, format = workload.config, workload.format
    block, text_block = (
        component_layout(name, config, format.name).block_bytes + READ_SLACK_BYTES
        for name in (EXPERTS[0], "text_encoder")
    )
    branches = 2 if choice.joint_guidance else 1
    workspace = dit_workspace(
        config.dit,
        format,
        workload.num_tokens,
        choice.chunk_tokens,
        branches,
        host.values,
        refined=workload.refine_steps > 0,
    )
    staging = STAGING_BUFFERS if host.staged else 0
    tile = vae_tile_pixels(workload.width, workload.height)
    inputs = PlanInputs(workload, choice, host, workspace, block, text_block, staging, tile)
    phases = []
    for phase in PHASES.values():
        if phase.peak is not None:
            vram, ram = phase.peak(inputs)
            phases.append(
                PhasePeak(phase.name, host.context_bytes + vram, host.process_bytes + ram)
            )
    return MemoryPlan(
        workload,
        choice,
        config.dit.num_layers,
        block,
        text_block,
        staging,
        tile,
        workspace,
        inputs.items,
        tuple(phases),
    )
