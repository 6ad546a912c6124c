"""The denoising loop under a plan and, where memory that the plan counts on is gone, from the last finished step on under a smaller one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing

from torch import Tensor

from lowvram.config import format_bytes
from lowvram.errors import OutOfMemoryError
from lowvram.memory.arena import Arena
from lowvram.memory.exhaustion import as_out_of_memory, hand_back
from lowvram.memory.ladder import RAM, Ladder
from lowvram.memory.limits import host_memory
from lowvram.models.wan import WanTransformer
from lowvram.run import Run
from lowvram.sampling.denoise import Expert, block_schedule, denoise
from lowvram.sampling.schedule import Schedule
from lowvram.sampling.solvers import Solver
from lowvram.streaming.stream import Buffers

LOW_RAM_BYTES = 256 * 2**20  # with less than this free on the machine, a run hands back the blocks that it keeps in RAM
OnStep = Callable[[int, Tensor], None]
_log = logging.getLogger(__name__)


def denoise_within_budgets(
    run: Run, experts: Mapping[str, Expert], schedule: Schedule, solver: Solver, latents: Tensor, on_step: OnStep
) -> Tensor:
    """The loop's remaining steps, down the ladder of plans as often as memory is short; the latents are the same by every way.

    Raises `OutOfMemoryError` naming the step at the ladder's foot.
    """
    ladder = Ladder(run.plan, run.describe, shared=run.device.type == "cpu")
    state = solver.state_dict()
    hand_back(run.device)

    def keep(finished: int, current: Tensor) -> None:
        nonlocal latents, state
        latents, state = current, solver.state_dict()
        on_step(finished, current)
        if finished < schedule.steps and ladder.plan.choice.host_blocks and host_memory().free_bytes < LOW_RAM_BYTES:
            raise OutOfMemoryError(f"less than {format_bytes(LOW_RAM_BYTES)} of RAM is free on this machine", RAM)

    while True:
        try:
            with as_out_of_memory():
                return _attempt(run, experts, schedule, solver, latents, keep)
        except OutOfMemoryError as error:
            short, failure = error.budget, str(error)
        hand_back(run.device)
        solver.load_state_dict(state)
        rung = ladder.down(short)
        if rung is None:
            raise run.exhausted(f"step {solver.index + 1} of {schedule.steps}", short, failure)
        _log.warning(
            "out of %s in step %d of %d (%s): going on from step %d with %s; the video stays the same",
            short, solver.index + 1, schedule.steps, failure, solver.index, rung.gives_up,
        )  # fmt: skip
        run.go_on_with(rung.plan)


def _attempt(run: Run, experts: Mapping[str, Expert], schedule: Schedule, solver: Solver, latents: Tensor, on_step: OnStep) -> Tensor:
    """The remaining steps under the run's plan; its memory is handed back however it ends."""
    plan, choice, config = run.plan, run.plan.choice, run.store.config.dit
    blocks = block_schedule(schedule, run.request, plan.num_blocks, choice.joint_guidance, solver.index)
    slots = choice.resident_blocks, choice.ring_slots, choice.host_blocks, plan.staging_buffers, choice.pinned_blocks
    with run.stream(blocks, Buffers(plan.slot_bytes, *slots)) as streamer, closing(Arena(plan.workspace, run.vram, run.device)) as arena:
        model = WanTransformer(config, run.store.format, run.shape, choice, arena, run.device)
        return denoise(model, experts, streamer, schedule, solver, run.request, latents, on_step)
