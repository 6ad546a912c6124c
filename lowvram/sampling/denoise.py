"""The denoising loop: expert by timestep, guidance, solver (spec 5.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram.errors import NumericsError
from lowvram.models.wan import Conditioning, EmbeddingsAndHead, WanTransformer
from lowvram.request import Request
from lowvram.sampling.schedule import Schedule
from lowvram.sampling.solvers import Solver
from lowvram.sigmas import expert_of
from lowvram.streaming.block import Blocks
from lowvram.streaming.schedule import BlockId

# The residual stream is watched at this many tokens per block: attention spreads a NaN to all of
# them.
WATCHED_TOKENS = 64


class Expert(NamedTuple):
    """What one expert needs beside its blocks."""

    conditioning: Conditioning
    ends: EmbeddingsAndHead


def block_schedule(
    schedule: Schedule, request: Request, num_layers: int, joint: bool, first_step: int
) -> list[BlockId]:
    """Every block that the loop will visit from `first_step` on, through the expert switch, in
    order.
    """
    visits: list[BlockId] = []
    for timestep in schedule.timesteps.tolist()[first_step:]:
        expert = expert_of(timestep, request.boundary)
        rounds = 1 if joint else request.branches(expert)
        visits += [(expert, index) for _ in range(rounds) for index in range(num_layers)]
    return visits


def guided(velocities: list[Tensor], scale: float) -> Tensor:
    """v_uncond + scale (v_cond - v_uncond), fp32; velocities: [v_cond, v_uncond] or [v_cond]."""
    if len(velocities) == 1:
        return velocities[0]
    positive, negative = velocities
    return negative + scale * (positive - negative)


@torch.no_grad()
def denoise(
    model: WanTransformer,
    experts: Mapping[str, Expert],
    streamer: Blocks,
    schedule: Schedule,
    solver: Solver,
    request: Request,
    latents: Tensor,
    on_step: Callable[[int, Tensor], None],
) -> Tensor:
    """From noise (or the latents of `solver.index` finished steps) to clean latents;
    `on_step(finished, latents)` after each step.

    Raises `NumericsError` naming step, expert and block where the latents stop being finite.
    """
    for step in range(solver.index, schedule.steps):
        timestep = int(schedule.timesteps[step])
        name = expert_of(timestep, request.boundary)
        watch = _Watch()
        expert = experts[name]
        velocities = model.velocities(
            latents, step, expert.conditioning, expert.ends, streamer, name, watch
        )
        latents = solver.step(latents, guided(velocities, request.guidance(name)))
        if not bool(torch.isfinite(latents).all()):
            raise NumericsError(
                f"step {step + 1} of {schedule.steps} (timestep {timestep}, expert {name}, "
                f"{watch.describe()}): the latents hold NaN or "
                "infinity; run `lowvram inspect MODEL --verify`, then try another format or a "
                "lower guidance"
            )
        on_step(step + 1, latents)
    return latents


class _Watch:
    """Remembers, without waiting for the device, behind which blocks the residual stream was
    finite.
    """

    def __init__(self) -> None:
        self._finite: list[tuple[int, Tensor]] = []

    def __call__(self, block: int, x: Tensor) -> None:
        self._finite.append(
            (block, torch.isfinite(x[:: max(1, x.shape[0] // WATCHED_TOKENS)]).all())
        )

    def describe(self) -> str:
        bad = [block for block, finite in self._finite if not bool(finite)]
        return f"block {min(bad)}" if bad else "behind the last block"
