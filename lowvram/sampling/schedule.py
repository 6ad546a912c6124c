"""Official grid of sigmas and timesteps, as tensors (spec section 5.1)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lowvram.errors import UsageError
from lowvram.sigmas import sigmas, timesteps


@dataclass(frozen=True)
class Schedule:
    """Sigmas and timesteps of N steps.

    sigmas: [N + 1] fp32, strictly decreasing, the last one 0; timesteps: [N] int64, the model's
    input.
    """

    sigmas: Tensor
    timesteps: Tensor

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)


def unipc_grid(steps: int, shift: float) -> Schedule:
    """The official grid of UniPC.

    sigma_i = shifted(FIRST_SIGMA * (1 - i / N)), computed in fp64 and stored in fp32;
    t_i = trunc(1000 * sigma_i), from the fp64 sigma.
    Raises `UsageError` when sigmas are equal in fp32: too many steps, or too extreme a shift.
    """
    if steps < 1:
        raise UsageError(f"steps {steps} is less than 1")
    exact = sigmas(steps, shift)
    stored = [1.0, *(_as_fp32(sigma) for sigma in exact), 0.0]
    if any(after >= before for before, after in pairwise(stored)):
        raise UsageError(
            f"shift {shift} with {steps} steps gives equal sigmas in fp32: use fewer steps or "
            f"a shift closer to 1"
        )
    return Schedule(
        torch.tensor(stored[1:], dtype=torch.float32),
        torch.tensor(timesteps(steps, shift), dtype=torch.int64),
    )


def make_schedule(solver: str, steps: int, shift: float) -> Schedule:
    """The grid for a solver of `solvers.make_solver`. Raises `UsageError`."""
    grids = {"unipc": unipc_grid, "euler": unipc_grid}
    if solver not in grids:
        raise UsageError(f"unknown solver {solver!r}: use one of {', '.join(grids)}")
    return grids[solver](steps, shift)


def _as_fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
