"""UniPC against diffusers' scheduler on the same grid, Euler against its formula, and resuming with
the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram.errors import ResumeError, UsageError
from lowvram.request import SOLVERS
from lowvram.sampling.schedule import Schedule, unipc_grid
from lowvram.sampling.solvers import Solver, make_solver

SHAPE = (1, 4, 2, 3, 5)
STEPS = (1, 2, 3, 5, 20, 40)


def velocity_of(x: Tensor, timestep: int) -> Tensor:
    """A smooth field that depends on sample and time, so that an error of either shows."""
    return torch.sin(x * 1.7 + timestep / 300) + 0.3 * x


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def diffusers_steps(schedule: Schedule) -> list[Tensor]:
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True,
        solver_order=2,
        solver_type="bh2",
        prediction_type="flow_prediction",
        lower_order_final=True,
    )
    scheduler.set_timesteps(schedule.steps)
    scheduler.sigmas, scheduler.timesteps = schedule.sigmas, schedule.timesteps
    x, out = noise(), []
    for t in schedule.timesteps:
        x = scheduler.step(velocity_of(x, int(t)), t, x, return_dict=False)[0]
        out.append(x)
    return out


def our_steps(
    name: str, schedule: Schedule, between: Callable[[int, Solver], Solver] | None = None
) -> list[Tensor]:
    solver, x, out = make_solver(name, schedule), noise(), []
    for i, t in enumerate(schedule.timesteps.tolist()):
        if between is not None:
            solver = between(i, solver)
        x = solver.step(x, velocity_of(x, t))
        out.append(x)
    return out


@pytest.mark.parametrize("shift", [12.0, 5.0, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_equals_diffusers_at_every_step(steps: int, shift: float) -> None:
    schedule = unipc_grid(steps, shift)
    for i, (ours, theirs) in enumerate(
        zip(our_steps("unipc", schedule), diffusers_steps(schedule), strict=True)
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), f"step {i}"


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", STEPS)
def test_a_field_that_points_at_one_sample_ends_there(name: str, steps: int) -> None:
    target = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)
    schedule = unipc_grid(steps, 5.0)
    solver, x = make_solver(name, schedule), noise()
    for sigma in schedule.sigmas[:-1]:
        x = solver.step(x, (x - target) / sigma)
    torch.testing.assert_close(x, target, rtol=0, atol=2e-5)


def test_unipc_works_where_the_first_timesteps_are_equal() -> None:
    """The official scheduler fails there; the result must lie on the line through its neighbours:
    the finer, the nearer.
    """
    apart, equal = unipc_grid(91, 12.0), unipc_grid(92, 12.0)
    assert apart.timesteps[0] != apart.timesteps[1]
    assert equal.timesteps[0] == equal.timesteps[1]
    exact = our_steps("unipc", unipc_grid(400, 12.0))[-1]
    errors = [
        (our_steps("unipc", schedule)[-1] - exact).norm() / exact.norm()
        for schedule in (apart, equal)
    ]
    assert errors[1] < errors[0] < 0.03


def test_euler_follows_its_formula() -> None:
    schedule = unipc_grid(5, 3.0)
    x = noise()
    for i, ours in enumerate(our_steps("euler", schedule)):
        x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity_of(
            x, int(schedule.timesteps[i])
        )
        torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


def test_half_precision_input_is_worked_in_fp32() -> None:
    for name in SOLVERS:
        solver = make_solver(name, unipc_grid(3, 5.0))
        x = noise().bfloat16()
        assert solver.step(x, x).dtype == torch.float32


def test_the_callers_tensors_are_left_alone() -> None:
    for name in SOLVERS:
        solver, x = make_solver(name, unipc_grid(3, 5.0)), noise()
        for _ in range(3):
            velocity = x * 0.5
            kept = x.clone(), velocity.clone()
            after = solver.step(x, velocity)
            assert torch.equal(x, kept[0])
            assert torch.equal(velocity, kept[1])
            x = after


@pytest.mark.parametrize("name", SOLVERS)
def test_p20_resume_at_every_step_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    schedule = unipc_grid(6, 12.0)
    whole = our_steps(name, schedule)

    def through_a_file(at: int) -> Callable[[int, Solver], Solver]:
        def between(i: int, solver: Solver) -> Solver:
            if i != at:
                return solver
            save_file(copy.deepcopy(solver.state_dict()), tmp_path / "solver.safetensors")
            fresh = make_solver(name, schedule)
            fresh.load_state_dict(load_file(tmp_path / "solver.safetensors"))
            return fresh

        return between

    for at in range(schedule.steps):
        for i, (resumed, uninterrupted) in enumerate(
            zip(our_steps(name, schedule, through_a_file(at)), whole, strict=True)
        ):
            assert torch.equal(resumed, uninterrupted), f"stopped before step {at}, differs at {i}"


def test_p20_a_foreign_state_is_refused() -> None:
    unipc = make_solver("unipc", unipc_grid(5, 5.0))
    for _ in range(3):
        unipc.step(noise(), noise())
    state = unipc.state_dict()
    with pytest.raises(ResumeError, match="same solver"):
        make_solver("euler", unipc_grid(5, 5.0)).load_state_dict(state)
    with pytest.raises(ResumeError, match="step 3, but this run has 2 steps"):
        make_solver("unipc", unipc_grid(2, 5.0)).load_state_dict(state)
    del state["clean.1"]
    with pytest.raises(ResumeError, match=r"clean\.1"):
        make_solver("unipc", unipc_grid(5, 5.0)).load_state_dict(state)


def test_a_finished_solver_refuses_another_step() -> None:
    for name in SOLVERS:
        solver = make_solver(name, unipc_grid(1, 5.0))
        solver.step(noise(), noise())
        with pytest.raises(UsageError, match="finished"):
            solver.step(noise(), noise())


def test_an_unknown_solver_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unipc, euler"):
        make_solver("heun", unipc_grid(1, 5.0))
