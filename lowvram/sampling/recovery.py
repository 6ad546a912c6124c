"""The denoising loop with fallback plans: out of memory, it goes on from the last finished step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from time import monotonic

from torch import Tensor

from lowvram.hardware.cgroups import host_memory
from lowvram.memory.arena import Arena
from lowvram.memory.out_of_memory import release_cached_memory, retry_out_of_memory
from lowvram.models.wan import WanTransformer
from lowvram.planner.fallback import FallbackPlans
from lowvram.run import Run
from lowvram.sampling.denoise import Expert, block_schedule, denoise
from lowvram.sampling.schedule import Schedule
from lowvram.sampling.solvers import Solver
from lowvram.streaming.block import BlockView
from lowvram.streaming.schedule import BlockId
from lowvram.streaming.stream import Buffers
from lowvram.units import format_bytes

# with less than this free on the machine, a run hands back the blocks that it keeps in RAM
LOW_RAM_BYTES = 256 * 2**20
# how often that is looked at, between two blocks: at 720p a block of A14B takes about as long on a
# small card
FREE_RAM_PERIOD_S = 2.0
OnStep = Callable[[int, Tensor], None]
_log = logging.getLogger(__name__)


def denoise_within_budgets(
    run: Run,
    experts: Mapping[str, Expert],
    schedule: Schedule,
    solver: Solver,
    latents: Tensor,
    on_step: OnStep,
) -> Tensor:
    """The clean latents, [C, T, h, w] float32: the loop's remaining steps, under the next fallback
    plan after each out-of-memory error. No fallback changes a bit.

    A step that does not fit the last plan is tried once more; then `OutOfMemoryError` names it.
    Where `on_step` itself runs out of memory, it is called again and its step is not recomputed.
    """
    fallbacks = FallbackPlans(run.plan, run.describe, shared=run.device.type == "cpu")
    state, told, again = solver.state_dict(), solver.index, ""

    def keep(finished: int, current: Tensor) -> None:
        nonlocal latents, state
        latents, state = current, solver.state_dict()
        tell()

    def tell() -> None:
        nonlocal told
        on_step(solver.index, latents)
        told = solver.index

    def work() -> Tensor:
        if told < solver.index:
            tell()
        if solver.index == schedule.steps:
            return latents
        return _attempt(run, fallbacks, experts, schedule, solver, latents, keep)

    def recover(short: str, failure: str) -> None:
        nonlocal again
        solver.load_state_dict(state)
        where = (
            f"step {solver.index + 1}" if told == solver.index else f"saving step {solver.index}"
        )
        fallback = fallbacks.down(short)
        if fallback is None and again == where:
            raise run.exhausted("denoise", f"{where} of {schedule.steps}", short, failure)
        if fallback is None:
            again = where  # another program may have released its memory meanwhile
        _log.warning(
            "out of %s in %s of %d (%s): going on from step %d with %s; the video stays the same",
            short,
            where,
            schedule.steps,
            failure,
            solver.index,
            fallback.gives_up if fallback else "the same plan once more",
        )
        if fallback is not None:
            run.go_on_with(fallback.plan)

    return retry_out_of_memory(run.device, work, recover)


def _attempt(
    run: Run,
    fallbacks: FallbackPlans,
    experts: Mapping[str, Expert],
    schedule: Schedule,
    solver: Solver,
    latents: Tensor,
    on_step: OnStep,
) -> Tensor:
    """The remaining steps under the run's current plan; its memory is released at the end."""
    plan, choice = run.plan, run.plan.choice
    blocks = block_schedule(
        schedule, run.request, plan.num_blocks, choice.joint_guidance, solver.index
    )
    with (
        closing(_RelievedBlocks(run, fallbacks, blocks)) as streamer,
        closing(Arena(plan.workspace, run.vram, run.device)) as arena,
    ):
        model = WanTransformer(run.workload, choice, arena, run.device)
        return denoise(model, experts, streamer, schedule, solver, run.request, latents, on_step)


class _RelievedBlocks:
    """The blocks of `schedule`. Where the machine's free RAM runs low, blocks cached in RAM are
    released between two visits.

    The arena stays, so no computed value is lost; blocks on the device and in flight are read from
    the disk again.
    """

    def __init__(self, run: Run, fallbacks: FallbackPlans, schedule: Sequence[BlockId]) -> None:
        self._run, self._fallbacks, self._schedule = run, fallbacks, schedule
        self._visited = 0
        self._looked = monotonic()
        self._open()

    @contextmanager
    def block(self, component: str, index: int) -> Iterator[BlockView]:
        if self._run.plan.choice.host_blocks and monotonic() - self._looked >= FREE_RAM_PERIOD_S:
            self._relieve()
        with self._streamer.block(component, index) as view:
            yield view
        # the computation's frame still names it when the next block is asked for, and the slots may
        # be handed back there
        view.close()
        self._visited += 1

    def close(self) -> None:
        self._stream.close()

    def _open(self) -> None:
        plan, choice = self._run.plan, self._run.plan.choice
        slots = (
            choice.resident_blocks,
            choice.ring_slots,
            choice.host_blocks,
            plan.staging_buffers,
            choice.pinned_blocks,
        )
        self._stream = ExitStack()
        self._streamer = self._stream.enter_context(
            self._run.stream(self._schedule[self._visited :], Buffers(plan.slot_bytes, *slots))
        )

    def _relieve(self) -> None:
        """Goes on with fewer blocks in RAM where other programs have left too little of it."""
        free_bytes = host_memory().free_bytes
        self._looked = monotonic()
        if free_bytes >= LOW_RAM_BYTES:
            return
        fallback = self._fallbacks.less_cache()
        if fallback is None:
            return
        _log.warning(
            "%s of RAM is free on this machine, less than %s: going on with %s; "
            "nothing is "
            "computed again, "
            "the video stays the same",
            format_bytes(free_bytes),
            format_bytes(LOW_RAM_BYTES),
            fallback.gives_up,
        )
        self._stream.close()
        del self._streamer  # it holds on to the slots
        release_cached_memory(self._run.device)
        self._run.go_on_with(fallback.plan)
        self._open()
