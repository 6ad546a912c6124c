"""Peak memory of every phase, computed before the run: pure arithmetic, no torch, no GPU.

`choose_plan` finds the fastest plan that fits two budgets; `describe_plan` gives the peaks of any
given choice. What a plan chooses (chunk, residency, tiers, shared visits) changes no bit of the
video; the VAE's tile follows from the video's size alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from lowvram_kernels.sizes import KEY_TILE

from lowvram.errors import BudgetError
from lowvram.hardware.profile import PINNED_SHARE
from lowvram.planner.allocator import packed_bytes, phase_rounding_bytes
from lowvram.planner.prediction import Prediction
from lowvram.planner.umt5 import text_bytes
from lowvram.planner.vae import decode_bytes, decode_rounding_bytes, vae_tile_pixels
from lowvram.planner.wan import (
    LATENTS_IN_BLOCK,
    LATENTS_IN_STATE,
    conditioning_bytes,
    conditioning_phase_bytes,
    latent_bytes,
    loop_host_bytes,
    loop_rounding_bytes,
    loop_temporaries_bytes,
)
from lowvram.planner.workspace import READ_SLACK_BYTES, Workspace, dit_workspace
from lowvram.request import latent_shape
from lowvram.store.layout import component_layout
from lowvram.units import format_bytes
from lowvram.variants import EXPERTS, ModelConfig

CHUNK_TOKENS = (8192, 4096, 2048, 1024, 512, 256, 128, 64)
# Below this many tokens a block computes faster than PCIe 4.0 brings the next one (kernels 5), so
# both branches share a visit.
JOINT_BELOW_TOKENS = 12_000
CUDA_CONTEXT_BYTES = 600 * 10**6
PROCESS_BYTES = 900 * 10**6
STAGING_BUFFERS = 2
RING_SLOTS = (2, 3, 4)
# Plans whose predicted times differ by less are equally fast: the simplest of them is taken.
SAME_TIME = 1e-3


@dataclass(frozen=True)
class PlanChoice:
    """What the planner is free to choose. `host_blocks` are kept in RAM, the first `pinned_blocks`
    of them page-locked.
    """

    chunk_tokens: int
    ring_slots: int
    resident_blocks: int
    host_blocks: int
    joint_guidance: bool
    pinned_blocks: int = 0


@dataclass(frozen=True)
class PhasePeak:
    """Peak bytes of one phase of a run."""

    phase: str
    vram_bytes: int
    ram_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """One run's memory. `items`: what the denoising phase's VRAM is made of; `slot_bytes`: a block
    and the slack of aligned reads.
    """

    variant: str
    format: str
    width: int
    height: int
    num_frames: int
    num_tokens: int
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
        return max(phase.vram_bytes for phase in self.phases)

    @property
    def peak_ram_bytes(self) -> int:
        return max(phase.ram_bytes for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        del data["workspace"]
        data["prediction"] = self.prediction.to_dict() if self.prediction else None
        return data | {
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
        }


# What predicts a plan's time; None where it cannot.
Clock = Callable[[MemoryPlan], Prediction | None]


@dataclass(frozen=True)
class Host:
    """What the machine takes before lowvram asks for anything. `staged`: device memory is not host
    memory.

    `references`: the ops run as torch code, whose temporaries count.
    """

    staged: bool
    context_bytes: int
    process_bytes: int = PROCESS_BYTES
    references: bool = True

    @classmethod
    def of(cls, device_type: str, process_bytes: int = PROCESS_BYTES) -> Host:
        cuda = device_type == "cuda"
        references = (
            not cuda
            or os.environ.get("LOWVRAM_BACKEND") == "reference"
            or find_spec("triton") is None
        )
        return cls(cuda, CUDA_CONTEXT_BYTES if cuda else 0, process_bytes, references)

    @property
    def rounds(self) -> bool:
        """Whether the device's memory comes in segments of torch's caching allocator: where there
        is a driver's context, there is one.
        """
        return self.context_bytes > 0


def describe_plan(
    config: ModelConfig,
    format: str,
    size: tuple[int, int],
    num_frames: int,
    steps: int,
    choice: PlanChoice,
    host: Host,
) -> MemoryPlan:
    """The plan that follows from `choice`, whatever it takes. size: (width, height) in pixels."""
    width, height = size
    latents = latent_shape(config, width, height, num_frames)
    layout = component_layout(EXPERTS[0], config, format)
    slot_bytes = layout.block_bytes + READ_SLACK_BYTES
    text_slot_bytes = (
        component_layout("text_encoder", config, format).block_bytes + READ_SLACK_BYTES
    )
    branches = 2 if choice.joint_guidance else 1
    workspace = dit_workspace(config.dit, format, latents.num_tokens, choice.chunk_tokens, branches)
    slots = choice.resident_blocks + choice.ring_slots
    items = {
        "residual stream": sum(
            size for name, (_, size) in workspace.regions.items() if name.startswith("residual.")
        ),
        "keys and values": sum(
            size for name, (_, size) in workspace.regions.items() if name in _KEYS_AND_VALUES
        ),
        "chunk workspace": workspace.nbytes - workspace.persistent_bytes,
        "block slots": slots * slot_bytes,
        "conditioning": conditioning_bytes(config, format, steps),
        "latents and velocities": LATENTS_IN_BLOCK * latent_bytes(latents),
        "reference temporaries" if host.references else "temporaries": loop_temporaries_bytes(
            config, format, latents, choice.chunk_tokens, host.references
        ),
        "context of the driver": host.context_bytes,
    }
    if host.rounds:
        items["allocator rounding"] = loop_rounding_bytes(
            config, format, latents, steps, slots, slot_bytes, workspace.nbytes
        )
    items["text keys and values"] = (
        workspace.persistent_bytes - items["residual stream"] - items["keys and values"]
    )
    staging = STAGING_BUFFERS if host.staged else 0
    ram = (
        host.process_bytes
        + (choice.host_blocks + staging) * slot_bytes
        + loop_host_bytes(config, format, latents, host.staged)
    )
    text_vram, text_ram = text_bytes(config, format, text_slot_bytes, staging)
    resumed = LATENTS_IN_STATE * latent_bytes(latents)
    conditioning_vram, conditioning_ram = conditioning_phase_bytes(
        config, format, steps, host.staged
    )
    tile = vae_tile_pixels(width, height)
    vae_vram, vae_ram = decode_bytes(config, latents, tile)
    if host.rounds:
        state = LATENTS_IN_STATE * [latent_bytes(latents)]
        text_vram += phase_rounding_bytes([*state, *2 * [text_slot_bytes]])
        conditioning_vram += phase_rounding_bytes(state)
        vae_vram += decode_rounding_bytes(config, latents, tile)
    phases = (
        PhasePeak("text", host.context_bytes + resumed + text_vram, host.process_bytes + text_ram),
        PhasePeak(
            "conditioning",
            host.context_bytes + resumed + conditioning_vram,
            host.process_bytes + conditioning_ram,
        ),
        PhasePeak("denoise", sum(items.values()), ram),
        PhasePeak("decode", host.context_bytes + vae_vram, host.process_bytes + vae_ram),
    )
    return MemoryPlan(
        config.variant,
        format,
        width,
        height,
        num_frames,
        latents.num_tokens,
        choice,
        config.dit.num_layers,
        slot_bytes,
        text_slot_bytes,
        staging,
        tile,
        workspace,
        items,
        phases,
    )


_KEYS_AND_VALUES = ("keys", "values", "key_scales", "value_scales")


def choose_plan(
    config: ModelConfig,
    format: str,
    size: tuple[int, int],
    num_frames: int,
    steps: int,
    host: Host,
    vram_bytes: int,
    ram_bytes: int,
    guided: bool = True,
    clock: Clock | None = None,
    pinned_limit_bytes: int | None = None,
) -> MemoryPlan:
    """The fastest plan that fits, by the clock's prediction; the simplest of equals: separate
    branches, few slots, large chunks.

    Without a clock: the largest chunk that fits beside two slots. In either case then as many
    resident blocks as VRAM and as many cached blocks as RAM allow, of which the first are
    page-locked up to the limit (None: half of the RAM budget).

    guided: whether a second, negative branch runs at all. Raises `BudgetError` naming the smallest
    budgets that would do.
    """
    tokens = latent_shape(config, *size, num_frames).num_tokens
    padded = -(-tokens // KEY_TILE) * KEY_TILE
    limit = int(ram_bytes * PINNED_SHARE) if pinned_limit_bytes is None else pinned_limit_bytes

    def plan_of(choice: PlanChoice) -> MemoryPlan:
        return describe_plan(config, format, size, num_frames, steps, choice, host)

    def completed(base: MemoryPlan) -> PlanChoice:
        slot_bytes = packed_bytes(base.slot_bytes) if host.rounds else base.slot_bytes
        return _add_host_blocks(
            base,
            _add_residents(base, vram_bytes, slot_bytes),
            ram_bytes,
            limit if host.staged else 0,
        )

    chunks = sorted({min(chunk, padded) for chunk in CHUNK_TOKENS}, reverse=True)
    smallest = plan_of(PlanChoice(chunks[-1], 1, 0, 0, False))
    if smallest.peak_vram_bytes > vram_bytes or smallest.peak_ram_bytes > ram_bytes:
        raise BudgetError(_refusal(smallest, vram_bytes, ram_bytes))
    if clock is not None:
        fitting = (
            choice
            for shared in (False, True)[: 1 + guided]
            for slots in RING_SLOTS
            for choice in _undominated(
                (plan_of(PlanChoice(chunk, slots, 0, 0, shared)) for chunk in chunks),
                vram_bytes,
                completed,
            )
        )
        fastest = _fastest(map(plan_of, _distinct(fitting)), clock) or _fastest(
            [plan_of(completed(smallest))], clock
        )
        if fastest is not None:
            return fastest
    joint = guided and tokens < JOINT_BELOW_TOKENS
    plans = [
        plan_of(PlanChoice(chunk, 2, 0, 0, shared))
        for shared in ((True, False) if joint else (False,))
        for chunk in chunks
    ]
    return plan_of(
        completed(next((plan for plan in plans if plan.peak_vram_bytes <= vram_bytes), smallest))
    )


def _undominated(
    bases: Iterable[MemoryPlan], vram_bytes: int, completed: Callable[[MemoryPlan], PlanChoice]
) -> Iterator[PlanChoice]:
    """Choices that fit, of falling chunk length: a shorter chunk is worth a look only where it
    makes room for another block.
    """
    most = -1
    for choice in (completed(base) for base in bases if base.peak_vram_bytes <= vram_bytes):
        if choice.resident_blocks > most:
            most = choice.resident_blocks
            yield choice


def _distinct(choices: Iterable[PlanChoice]) -> Iterator[PlanChoice]:
    seen: set[PlanChoice] = set()
    for choice in choices:
        if choice not in seen:
            seen.add(choice)
            yield choice


def _fastest(plans: Iterable[MemoryPlan], clock: Clock) -> MemoryPlan | None:
    """The first plan whose predicted time is within `SAME_TIME` of the shortest; None where nothing
    can be predicted.

    The first plan has the longest chunk that fits: where its computing alone takes as long as all
    of it, nothing can be faster.
    """
    timed: list[tuple[float, MemoryPlan]] = []
    for plan in plans:
        prediction = clock(plan)
        if prediction is not None:
            timed.append((prediction.denoise_s, replace(plan, prediction=prediction)))
            if len(timed) == 1 and prediction.denoise_s <= prediction.compute_s * (1 + SAME_TIME):
                break
    shortest = min((seconds for seconds, _ in timed), default=0.0)
    return next((plan for seconds, plan in timed if seconds <= shortest * (1 + SAME_TIME)), None)


def _add_host_blocks(
    base: MemoryPlan, choice: PlanChoice, ram_bytes: int, pinned_limit_bytes: int
) -> PlanChoice:
    """Spends what is left of the denoising phase's RAM on cached blocks; the first of them are
    page-locked beside the staging buffers.
    """
    denoise = next(phase.ram_bytes for phase in base.phases if phase.phase == "denoise")
    spare = max(0, ram_bytes - denoise) // base.slot_bytes
    host_blocks = min(spare, base.num_blocks - choice.resident_blocks)
    pinned = max(0, pinned_limit_bytes // base.slot_bytes - base.staging_buffers)
    return replace(choice, host_blocks=host_blocks, pinned_blocks=min(host_blocks, pinned))


def _add_residents(base: MemoryPlan, vram_bytes: int, slot_bytes: int) -> PlanChoice:
    """Spends what is left of the denoising phase's VRAM on resident blocks of `slot_bytes`; a whole
    expert needs no ring.
    """
    denoise = next(phase.vram_bytes for phase in base.phases if phase.phase == "denoise")
    spare = (vram_bytes - denoise) // slot_bytes
    if spare + base.choice.ring_slots >= base.num_blocks:
        return replace(base.choice, resident_blocks=base.num_blocks, ring_slots=0)
    return replace(base.choice, resident_blocks=spare)


def _refusal(smallest: MemoryPlan, vram_bytes: int, ram_bytes: int) -> str:
    name = f"{smallest.width}x{smallest.height} x {smallest.num_frames} frames in {smallest.format}"
    needs = []
    for label, peak, budget, attribute in (
        ("VRAM", smallest.peak_vram_bytes, vram_bytes, "vram_bytes"),
        ("RAM", smallest.peak_ram_bytes, ram_bytes, "ram_bytes"),
    ):
        if peak > budget:
            phase = max(smallest.phases, key=lambda phase: getattr(phase, attribute)).phase
            flag = label.lower()
            mebibytes = -(-peak // 2**20)
            needs.append(
                f"{label} of {format_bytes(budget)} is too little (the {phase} phase needs "
                f"{format_bytes(peak)}): "
                f"use --{flag} {mebibytes}MiB or more"
            )
    return f"{name}: {'; '.join(needs)}, or a smaller size or fewer frames"
