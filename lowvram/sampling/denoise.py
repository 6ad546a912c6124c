"""The denoising loop: expert by timestep, classifier-free guidance, solver step (spec 5.4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from lowvram_kernels.sizes import FLOAT16_MAX
from torch import Tensor

from lowvram.errors import NumericsError
from lowvram.models.wan import Conditioning, EmbeddingsAndHead, WanTransformer
from lowvram.request import Request
from lowvram.sampling.schedule import Schedule
from lowvram.sampling.solvers import Solver
from lowvram.sigmas import expert_of
from lowvram.streaming.block import Blocks
from lowvram.streaming.schedule import BlockId

_log = logging.getLogger(__name__)
# Tokens of the residual stream checked for NaN after each block; attention spreads a NaN to all.
WATCHED_TOKENS = 64


class Expert(NamedTuple):
    """Tensors of one expert besides its blocks: its conditioning, embeddings and head."""

    conditioning: Conditioning
    ends: EmbeddingsAndHead


def block_schedule(
    schedule: Schedule, request: Request, num_layers: int, joint: bool, first_step: int
) -> list[BlockId]:
    """Block visits of the loop from `first_step` on, in order, across the expert switch.

    joint: both guidance branches share one visit of a block; otherwise each branch visits all
    blocks of a step.
    """
    visits: list[BlockId] = []
    for timestep in schedule.timesteps.tolist()[first_step:]:
        expert = expert_of(timestep, request.boundary)
        rounds = 1 if joint else request.branches(expert)
        visits += [(expert, index) for _ in range(rounds) for index in range(num_layers)]
    return visits


def guided(velocities: list[Tensor], scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond), in fp32 (spec 5.4).

    velocities: [v_cond, v_uncond], or [v_cond] alone, which is returned unchanged.
    """
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
    """Denoise latents [C, T, h, w] float32, from step `solver.index` to the last.

    latents: noise, or the result of the first `solver.index` steps. on_step: called as
    `on_step(finished_steps, latents)` after each step. Returns the clean latents. Raises
    `NumericsError` that names step, expert and block if the latents become NaN or infinite.
    """
    watched: set[str] = set()
    for step in range(solver.index, schedule.steps):
        timestep = int(schedule.timesteps[step])
        name = expert_of(timestep, request.boundary)
        finite = _FiniteCheck()
        expert = experts[name]
        velocities = model.velocities(
            latents,
            step,
            expert.conditioning,
            expert.ends,
            streamer,
            name,
            finite,
            refined=request.refines(step),
            watched=name not in watched,
        )
        if name not in watched:
            watched.add(name)
            _warn_of_clamped(name, model.take_largest_activation())
        latents = solver.step(latents, guided(velocities, request.guidance(name)))
        if not bool(torch.isfinite(latents).all()):
            raise NumericsError(
                f"step {step + 1} of {schedule.steps} (timestep {timestep}, expert {name}, "
                f"{finite.describe()}): the latents contain NaN or infinity; run `lowvram inspect "
                f"MODEL --verify`, then try another format or a lower guidance"
            )
        on_step(step + 1, latents)
    return latents


def _warn_of_clamped(expert: str, largest: float) -> None:
    """Warn if activations of an expert's first step reach the limit of fp16."""
    if largest >= FLOAT16_MAX:
        _log.warning(
            "activations of the %s expert are larger than %g, the limit of fp16, and were clamped: "
            "if the video looks wrong, set LOWVRAM_ACTIVATIONS=bf16",
            expert,
            FLOAT16_MAX,
        )


class _FiniteCheck:
    """Records after each block whether the residual stream is finite, without a device sync."""

    def __init__(self) -> None:
        self._finite: list[tuple[int, Tensor]] = []

    def __call__(self, block: int, x: Tensor) -> None:
        self._finite.append(
            (block, torch.isfinite(x[:: max(1, x.shape[0] // WATCHED_TOKENS)]).all())
        )

    def describe(self) -> str:
        """The first block with a non-finite residual stream, in words."""
        bad = [block for block, finite in self._finite if not bool(finite)]
        return f"block {min(bad)}" if bad else "after the last block"
