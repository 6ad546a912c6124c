"""Fallback plans: smaller plans for a run when other programs take memory.

In the quantized formats no fallback changes a bit of the video. In the unquantized ones, libraries
choose their matrix product by the length of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lowvram.planner.phases import PlanChoice
from lowvram.planner.plan import CHUNK_TOKENS, MemoryPlan

VRAM, RAM = "VRAM", "RAM"
Describe = Callable[[PlanChoice], MemoryPlan]
# A choice of a model with so many blocks -> the smaller one, and what it gives up; None where there
# is nothing of the kind to give up.
Smaller = tuple[PlanChoice, str] | None


@dataclass(frozen=True)
class Fallback:
    """A fallback plan, and what it gives up in words."""

    plan: MemoryPlan
    gives_up: str


class FallbackPlans:
    """The fallback plans of a plan. Each is used at most once, so every run ends.

    shared: both budgets are the same memory (a CPU), so freeing one also helps the other.
    """

    def __init__(self, plan: MemoryPlan, describe: Describe, shared: bool = False) -> None:
        self.plan = plan
        self._describe = describe
        self._left: dict[str, Iterator[Callable[[PlanChoice, int], Smaller]]] = {
            VRAM: iter(_VRAM_FALLBACKS),
            RAM: iter(_RAM_FALLBACKS),
        }
        self._order = {
            VRAM: (RAM, VRAM) if shared else (VRAM,),
            RAM: (RAM, VRAM) if shared else (RAM,),
        }

    def down(self, short: str) -> Fallback | None:
        """The next fallback that needs less of the budget `short` and no more of the other; None
        after the last.
        """
        return next(filter(None, map(self._next, self._order[short])), None)

    def less_cache(self) -> Fallback | None:
        """The next fallback that only caches fewer blocks in RAM; None if no block is cached."""
        return self._next(RAM)

    def _next(self, budget: str) -> Fallback | None:
        for smaller in self._left[budget]:
            proposed = smaller(self.plan.choice, self.plan.num_blocks)
            if proposed is None:
                continue
            plan = self._describe(proposed[0])
            if _needs(plan, budget) < _needs(self.plan, budget) and all(
                _needs(plan, b) <= _needs(self.plan, b) for b in (VRAM, RAM)
            ):
                self.plan = plan
                return Fallback(plan, proposed[1])
        return None


def _needs(plan: MemoryPlan, budget: str) -> int:
    """Peak of the denoising phase in a budget."""
    denoise = plan.peak("denoise")
    return denoise.vram_bytes if budget == VRAM else denoise.ram_bytes


def _residents(choice: PlanChoice, blocks: int, resident: int) -> PlanChoice:
    ring = min(max(choice.ring_slots, 2), blocks - resident)
    host = min(choice.host_blocks, blocks - resident)
    return replace(
        choice,
        resident_blocks=resident,
        ring_slots=ring,
        host_blocks=host,
        pinned_blocks=min(choice.pinned_blocks, host),
    )


def _half_the_residents(choice: PlanChoice, blocks: int) -> Smaller:
    kept = choice.resident_blocks // 2
    return (
        (
            _residents(choice, blocks, kept),
            f"keeping {kept} blocks on the device instead of {choice.resident_blocks}",
        )
        if kept
        else None
    )


def _no_residents(choice: PlanChoice, blocks: int) -> Smaller:
    return (
        (_residents(choice, blocks, 0), "keeping no block on the device")
        if choice.resident_blocks
        else None
    )


def _one_slot(choice: PlanChoice, blocks: int) -> Smaller:
    one = replace(choice, resident_blocks=0, ring_slots=1)
    return (
        (one, "streaming through one slot: blocks no longer travel while others compute")
        if choice.ring_slots > 1
        else None
    )


def _separate_branches(choice: PlanChoice, blocks: int) -> Smaller:
    return (
        (replace(choice, joint_guidance=False), "one guidance branch after the other")
        if choice.joint_guidance
        else None
    )


def _smaller_chunk(choice: PlanChoice, blocks: int) -> Smaller:
    chunk = next((tokens for tokens in CHUNK_TOKENS if tokens < choice.chunk_tokens), None)
    return (
        (
            replace(choice, chunk_tokens=chunk),
            f"chunks of {chunk} tokens instead of {choice.chunk_tokens}",
        )
        if chunk
        else None
    )


def _smallest_chunk(choice: PlanChoice, blocks: int) -> Smaller:
    chunk = CHUNK_TOKENS[-1]
    smallest = replace(choice, chunk_tokens=chunk)
    return (
        (smallest, f"chunks of {chunk} tokens instead of {choice.chunk_tokens}")
        if chunk < choice.chunk_tokens
        else None
    )


def _half_the_cache(choice: PlanChoice, blocks: int) -> Smaller:
    kept = choice.host_blocks // 2
    less = replace(choice, host_blocks=kept, pinned_blocks=min(choice.pinned_blocks, kept))
    return (less, f"keeping {kept} blocks in RAM instead of {choice.host_blocks}") if kept else None


def _no_cache(choice: PlanChoice, blocks: int) -> Smaller:
    return (
        (replace(choice, host_blocks=0, pinned_blocks=0), "reading every block from the disk")
        if choice.host_blocks
        else None
    )


_VRAM_FALLBACKS = (
    _half_the_residents,
    _no_residents,
    _one_slot,
    _separate_branches,
    _smaller_chunk,
    _smallest_chunk,
)
_RAM_FALLBACKS = (_half_the_cache, _no_cache)
