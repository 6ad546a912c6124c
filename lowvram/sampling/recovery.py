"""The denoising loop with fallback plans: after an out-of-memory error it continues from the last
finished step with less memory.
"""

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
from lowvram.units import format_memory

# With less free RAM on the machine, a run releases blocks that it caches in RAM.
LOW_RAM_BYTES = 256 * 2**20
# Minimum time between two checks of free RAM, which happen between blocks; about the predicted time
# of an A14B block at 720p on a small card.
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
    """Run `denoise`, with the next fallback plan after each out-of-memory error.

    Arguments and result as in `denoise`; in the quantized formats no fallback changes a bit of the
    result (`planner.fallback`). With the last fallback plan a step is retried once, then
    `OutOfMemoryError` names it. If `on_step` itself runs out of memory, it is called again and its
    step is not recomputed.
    """
    fallbacks = FallbackPlans(run.plan, run.describe, shared=run.device.type == "cpu")
    state, reported, retried = solver.state_dict(), solver.index, ""

    def keep(finished: int, current: Tensor) -> None:
        nonlocal latents, state
        latents, state = current, solver.state_dict()
        report()

    def report() -> None:
        nonlocal reported
        on_step(solver.index, latents)
        reported = solver.index

    def work() -> Tensor:
        if reported < solver.index:
            report()
        if solver.index == schedule.steps:
            return latents
        return _attempt(run, fallbacks, experts, schedule, solver, latents, keep)

    def recover(short: str, failure: str) -> None:
        nonlocal retried
        solver.load_state_dict(state)
        where = (
            f"step {solver.index + 1}"
            if reported == solver.index
            else f"saving step {solver.index}"
        )
        fallback = fallbacks.down(short)
        if fallback is None and retried == where:
            raise run.exhausted("denoise", f"{where} of {schedule.steps}", short, failure)
        if fallback is None:
            retried = where  # another program may have released its memory meanwhile
        _log.warning(
            "out of %s in %s of %d (%s): continuing from step %d with %s; the video stays the same",
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
    """Run the remaining steps under the run's current plan; its memory is released at the end."""
    plan, choice = run.plan, run.plan.choice
    blocks = block_schedule(
        schedule, run.request, plan.num_blocks, choice.joint_guidance, solver.index
    )
    with (
        closing(_ReleasingBlocks(run, fallbacks, blocks)) as streamer,
        closing(Arena(plan.workspace, run.vram, run.device)) as arena,
    ):
        model = WanTransformer(run.workload, choice, arena, run.device)
        return denoise(model, experts, streamer, schedule, solver, run.request, latents, on_step)


class _ReleasingBlocks:
    """Streams the blocks of `schedule`, and releases blocks cached in RAM between two visits if the
    machine's free RAM is low.

    To release them the stream is reopened under a smaller plan: blocks on the device and in flight
    are read from disk again. The arena is kept, so no computed value is lost.
    """

    def __init__(self, run: Run, fallbacks: FallbackPlans, schedule: Sequence[BlockId]) -> None:
        self._run, self._fallbacks, self._schedule = run, fallbacks, schedule
        self._visited = 0
        self._checked_s = monotonic()
        self._open()

    @contextmanager
    def block(self, component: str, index: int) -> Iterator[BlockView]:
        """The next block of the schedule, valid until the context ends."""
        if self._run.plan.choice.host_blocks and monotonic() - self._checked_s >= FREE_RAM_PERIOD_S:
            self._release_if_low()
        with self._streamer.block(component, index) as view:
            yield view
        # The caller may still hold the view when the next visit releases the slots.
        view.close()
        self._visited += 1

    def close(self) -> None:
        """Close the stream and release its buffers."""
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

    def _release_if_low(self) -> None:
        """Continue with fewer blocks in RAM if the machine's free RAM is low."""
        free_bytes = host_memory().free_bytes
        self._checked_s = monotonic()
        if free_bytes >= LOW_RAM_BYTES:
            return
        fallback = self._fallbacks.less_cache()
        if fallback is None:
            return
        _log.warning(
            "%s of RAM is free on this machine, less than %s: continuing with %s; nothing is "
            "computed again, the video stays the same",
            format_memory(free_bytes),
            format_memory(LOW_RAM_BYTES),
            fallback.gives_up,
        )
        self._stream.close()
        del self._streamer  # it references the slots
        release_cached_memory(self._run.device)
        self._run.go_on_with(fallback.plan)
        self._open()
