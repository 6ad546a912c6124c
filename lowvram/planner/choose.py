"""Choose the fastest plan within two budgets.

A plan's choices (chunk length, resident blocks, tiers, shared visits) change no bit of the video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from lowvram_kernels.sizes import KEY_TILE

from lowvram.errors import BudgetError
from lowvram.hardware.profile import PINNED_SHARE
from lowvram.planner.allocator import packed_bytes
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import CHUNK_TOKENS, MemoryPlan, describe_plan
from lowvram.planner.prediction import Prediction
from lowvram.request import Workload
from lowvram.units import format_memory

# Below this many tokens a block computes faster than PCIe 4.0 brings the next one (kernels 5), so
# both branches share a visit.
JOINT_BELOW_TOKENS = 12_000
RING_SLOTS = (2, 3, 4)
# Plans whose predicted times differ by less are equally fast: the simplest of them is taken.
SAME_TIME = 1e-3

# Predicts the time of a plan; None where it cannot.
Clock = Callable[[MemoryPlan], Prediction | None]


def choose_plan(
    workload: Workload,
    host: Host,
    vram_bytes: int,
    ram_bytes: int,
    clock: Clock | None = None,
    pinned_limit_bytes: int | None = None,
) -> MemoryPlan:
    """The fastest plan within the budgets, by the clock's prediction; of equally fast plans the
    simplest: separate branches, few slots, large chunks.

    Without a clock: the largest chunk that fits with two slots. Then as many resident blocks as
    VRAM allows and as many cached blocks as RAM allows, the first of them page-locked up to
    `pinned_limit_bytes` (None: half of the RAM budget).

    Raises `BudgetError` with the smallest budgets that work.
    """
    tokens = workload.num_tokens
    padded = -(-tokens // KEY_TILE) * KEY_TILE
    limit = int(ram_bytes * PINNED_SHARE) if pinned_limit_bytes is None else pinned_limit_bytes

    def plan_of(choice: PlanChoice) -> MemoryPlan:
        return describe_plan(workload, choice, host)

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
            for shared in (False, True)[: 1 + workload.guided]
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
    joint = workload.guided and tokens < JOINT_BELOW_TOKENS
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
    """The choices that fit, by falling chunk length; a shorter chunk only if it makes room for
    another resident block.
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
    """The first plan whose predicted time is within `SAME_TIME` of the shortest; None without
    predictions.

    The first plan has the longest chunk that fits. If its computing time alone equals its total
    time, no other plan can be faster.
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
    """Fill the RAM left in the denoising phase with cached blocks. The first of them are
    page-locked, within the limit that staging buffers share.
    """
    denoise = base.peak("denoise").ram_bytes
    spare = max(0, ram_bytes - denoise) // base.slot_bytes
    host_blocks = min(spare, base.num_blocks - choice.resident_blocks)
    pinned = max(0, pinned_limit_bytes // base.slot_bytes - base.staging_buffers)
    return replace(choice, host_blocks=host_blocks, pinned_blocks=min(host_blocks, pinned))


def _add_residents(base: MemoryPlan, vram_bytes: int, slot_bytes: int) -> PlanChoice:
    """Fill the VRAM left in the denoising phase with resident blocks of `slot_bytes`. A wholly
    resident expert needs no ring.
    """
    denoise = base.peak("denoise").vram_bytes
    spare = (vram_bytes - denoise) // slot_bytes
    if spare + base.choice.ring_slots >= base.num_blocks:
        return replace(base.choice, resident_blocks=base.num_blocks, ring_slots=0)
    return replace(base.choice, resident_blocks=spare)


def _refusal(smallest: MemoryPlan, vram_bytes: int, ram_bytes: int) -> str:
    clip = smallest.workload
    name = f"{clip.width}x{clip.height} x {clip.num_frames} frames in {clip.format.name}"
    needs = []
    for label, peak, budget, attribute in (
        ("VRAM", smallest.peak_vram_bytes, vram_bytes, "vram_bytes"),
        ("RAM", smallest.peak_ram_bytes, ram_bytes, "ram_bytes"),
    ):
        if peak > budget:
            phase = max(smallest.phases, key=lambda phase: getattr(phase, attribute)).phase
            flag = label.lower()
            needs.append(
                f"{label} of {format_memory(budget)} is too little (the {phase} phase needs "
                f"{format_memory(peak)}): "
                f"use --{flag} {_rounded_up(peak)} or more"
            )
    return f"{name}: {'; '.join(needs)}, or a smaller size or fewer frames"


def _rounded_up(nbytes: int) -> str:
    """An amount as an option takes it, at least `nbytes`: `5.31GiB`, below 1 GiB in MiB."""
    if nbytes < 2**30:
        return f"{-(-nbytes // 2**20)}MiB"
    hundredths = -(-nbytes * 100 // 2**30)
    return f"{hundredths // 100}.{hundredths % 100:02d}GiB"
