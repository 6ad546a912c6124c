"""The phases of a run: name, label, leaner way and peak memory of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.sizes import values_name

from lowvram.errors import UsageError
from lowvram.planner.allocator import phase_rounding_bytes
from lowvram.planner.umt5 import text_bytes
from lowvram.planner.vae import decode_bytes, decode_rounding_bytes
from lowvram.planner.wan import (
    LATENTS_IN_BLOCK,
    LATENTS_IN_STATE,
    conditioning_bytes,
    conditioning_phase_bytes,
    copied_weight_bytes,
    latent_bytes,
    loop_host_bytes,
    loop_rounding_bytes,
    loop_temporaries_bytes,
)
from lowvram.planner.workspace import Workspace
from lowvram.request import Workload

CUDA_CONTEXT_BYTES = 600 * 10**6
PROCESS_BYTES = 900 * 10**6
_KEYS_AND_VALUES = ("keys", "values", "key_scales", "value_scales")


@dataclass(frozen=True)
class Host:
    """Memory that the machine takes before lowvram allocates anything.

    staged: device memory is separate from host memory; context_bytes: the driver's context on the
    device; process_bytes: code and libraries in host memory; references: ops run as torch code,
    whose temporaries count; values: name of the dtype of quantized attention's values.
    """

    staged: bool
    context_bytes: int
    process_bytes: int = PROCESS_BYTES
    references: bool = True
    values: str = "int8"

    @classmethod
    def of(
        cls, device_type: str, process_bytes: int = PROCESS_BYTES, architecture: str = ""
    ) -> Host:
        """The assumed values for `cuda` or `cpu`. architecture: of the GPU, such as `sm_90`.

        Raises `UsageError` for an unknown `LOWVRAM_PV`.
        """
        cuda = device_type == "cuda"
        references = (
            not cuda
            or os.environ.get("LOWVRAM_BACKEND") == "reference"
            or find_spec("triton") is None
        )
        context = CUDA_CONTEXT_BYTES if cuda else 0
        try:
            values = values_name(architecture if cuda else "")
        except UnsupportedOpError as error:
            raise UsageError(str(error)) from None
        return cls(cuda, context, process_bytes, references, values)

    @property
    def rounds(self) -> bool:
        """Whether torch's caching allocator serves the device in segments: true for every device
        with a driver's context.
        """
        return self.context_bytes > 0


@dataclass(frozen=True)
class PlanChoice:
    """The planner's free parameters. `host_blocks` are kept in RAM, the first `pinned_blocks` of
    them page-locked.
    """

    chunk_tokens: int
    ring_slots: int
    resident_blocks: int
    host_blocks: int
    joint_guidance: bool
    pinned_blocks: int = 0


@dataclass(frozen=True)
class PlanInputs:
    """Inputs of the peak formulas. slot_bytes: a block with the slack for aligned reads."""

    workload: Workload
    choice: PlanChoice
    host: Host
    workspace: Workspace
    slot_bytes: int
    text_slot_bytes: int
    staging_buffers: int
    vae_tile_pixels: int

    @cached_property
    def items(self) -> dict[str, int]:
        """VRAM of the denoising phase by purpose, including the driver's context."""
        return _denoise_items(self)

    @property
    def resumed_bytes(self) -> int:
        """VRAM of a resumed run's latents and solver state."""
        return LATENTS_IN_STATE * latent_bytes(self.workload.latents)

    def rounding_bytes(self, *sizes: int) -> int:
        """VRAM that the allocator adds to the resumed state and to tensors of these sizes."""
        if not self.host.rounds:
            return 0
        state = LATENTS_IN_STATE * [latent_bytes(self.workload.latents)]
        return phase_rounding_bytes([*state, *sizes])


def _text(inputs: PlanInputs) -> tuple[int, int]:
    vram, ram = text_bytes(inputs.workload, inputs.text_slot_bytes, inputs.staging_buffers)
    rounding = inputs.rounding_bytes(*2 * [inputs.text_slot_bytes])
    return inputs.resumed_bytes + vram + rounding, ram


def _conditioning(inputs: PlanInputs) -> tuple[int, int]:
    vram, ram = conditioning_phase_bytes(inputs.workload, inputs.host.staged)
    copied = copied_weight_bytes(inputs.workload)
    return inputs.resumed_bytes + vram + inputs.rounding_bytes(*copied), ram


def _denoise(inputs: PlanInputs) -> tuple[int, int]:
    blocks = inputs.choice.host_blocks + inputs.staging_buffers
    vram = sum(inputs.items.values()) - inputs.host.context_bytes
    ram = blocks * inputs.slot_bytes + loop_host_bytes(inputs.workload, inputs.host.staged)
    return vram, ram


def _decode(inputs: PlanInputs) -> tuple[int, int]:
    vram, ram = decode_bytes(inputs.workload, inputs.vae_tile_pixels)
    if inputs.host.rounds:
        vram += decode_rounding_bytes(inputs.workload, inputs.vae_tile_pixels)
    return vram, ram


def _denoise_items(inputs: PlanInputs) -> dict[str, int]:
    workload, choice, workspace = inputs.workload, inputs.choice, inputs.workspace
    slots = choice.resident_blocks + choice.ring_slots
    references = inputs.host.references
    items = {
        "residual stream": sum(
            size for name, (_, size) in workspace.regions.items() if name.startswith("residual.")
        ),
        "keys and values": sum(
            size for name, (_, size) in workspace.regions.items() if name in _KEYS_AND_VALUES
        ),
        "chunk workspace": workspace.nbytes - workspace.persistent_bytes,
        "block slots": slots * inputs.slot_bytes,
        "conditioning": conditioning_bytes(workload),
        "latents and velocities": LATENTS_IN_BLOCK * latent_bytes(workload.latents),
        "reference temporaries" if references else "temporaries": loop_temporaries_bytes(
            workload, choice.chunk_tokens, references
        ),
        "context of the driver": inputs.host.context_bytes,
    }
    if inputs.host.rounds:
        items["allocator rounding"] = loop_rounding_bytes(
            workload, slots, inputs.slot_bytes, workspace.nbytes
        )
    items["text keys and values"] = (
        workspace.persistent_bytes - items["residual stream"] - items["keys and values"]
    )
    return items


@dataclass(frozen=True)
class Phase:
    """A part of a run that releases its memory before the next begins.

    label: its name in the terminal; peak: (VRAM, RAM) bytes beside the driver's context and the
    process, None for a phase that is not planned; leaner: its slower way with less memory and the
    same bits, None where there is none (the denoising phase has fallback plans instead).
    """

    name: str
    label: str
    peak: Callable[[PlanInputs], tuple[int, int]] | None
    leaner: str | None = None


PHASES = {
    phase.name: phase
    for phase in (
        Phase("text", "reading the prompt", _text, "one block slot and one staging buffer"),
        Phase("conditioning", "preparing the experts", _conditioning),
        Phase("denoise", "denoising", _denoise),
        Phase("decode", "decoding frames", _decode, "the decoder's weights read one by one"),
        Phase("write", "writing the video", None),
    )
}
