"""Solvers of the flow ODE: UniPC in closed form (spec section 5.1) and Euler.

Weights are computed in fp64 from the fp32 sigmas. Samples are fp32 and only used element-wise, so
the results do not depend on layout or device. The state of a solver is saved with a resumable run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowvram.errors import ResumeError, UsageError
from lowvram.sampling.schedule import Schedule

ORDER = 2


class Solver(Protocol):
    """A solver; `index` is the number of finished steps."""

    index: int

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        """Advance the latents x by one step; velocity: the model's output at x, same shape."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """State from which `load_state_dict` continues."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore a state of `state_dict`. Raises `ResumeError`."""
        ...


class Euler:
    """Euler's method: x <- x + (sigma_next - sigma) * velocity, in fp32."""

    def __init__(self, schedule: Schedule) -> None:
        self.sigmas: list[float] = schedule.sigmas.tolist()
        self.index = 0

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        """Advance x by one step. Raises `UsageError` after the last step."""
        _check_unfinished(self.index, self.sigmas)
        here, after = self.sigmas[self.index : self.index + 2]
        self.index += 1
        return _combine([(1.0, x), (after - here, velocity)])

    def state_dict(self) -> dict[str, Tensor]:
        """The index."""
        return {"index": torch.tensor(self.index)}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore a state of `state_dict`. Raises `ResumeError`."""
        self.index = _loaded_index(state, self.sigmas, lambda index: {"index"})


class UniPC:
    """UniPC of second order: bh2, clean-sample prediction, corrector at all steps but the first.

    The first and the last step are of first order. Always starts at index 0. The official scheduler
    finds its first index by the integer timestep: if the first two are equal (shift 12: 92 steps
    and more), it starts at 1 and fails an assertion at the last step, so there is no result to
    match.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.sigmas: list[float] = schedule.sigmas.tolist()
        self.index = 0
        self.sample: Tensor | None = None  # corrected sample of the previous step
        self.clean: list[Tensor] = []  # clean samples predicted at the last two steps, newest first

    def step(self, x: Tensor, velocity: Tensor) -> Tensor:
        """Correct x, then advance it by one step. Raises `UsageError` after the last step."""
        _check_unfinished(self.index, self.sigmas)
        i = self.index
        clean = _combine([(1.0, x), (-self.sigmas[i], velocity)])
        if self.sample is not None:
            x = _combine(
                list(
                    zip(
                        corrector_weights(self.sigmas, i),
                        [self.sample, clean, *self.clean],
                        strict=False,
                    )
                )
            )
        self.sample = x.float()
        self.clean = [clean, *self.clean][:ORDER]
        self.index += 1
        return _combine(
            list(zip(predictor_weights(self.sigmas, i), [self.sample, *self.clean], strict=False))
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Index, sample and clean samples; a restored run gives the same bits."""
        state = {"index": torch.tensor(self.index)}
        if self.sample is not None:
            state["sample"] = self.sample
        return state | {f"clean.{age}": tensor for age, tensor in enumerate(self.clean)}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore a state of `state_dict`. Raises `ResumeError`."""

        def keys(index: int) -> set[str]:
            return {
                "index",
                *(["sample"] if index else []),
                *(f"clean.{age}" for age in range(min(ORDER, index))),
            }

        self.index = _loaded_index(state, self.sigmas, keys)
        tensors = {key: value.float() for key, value in state.items() if isinstance(value, Tensor)}
        self.sample = tensors.get("sample")
        self.clean = [tensors[f"clean.{age}"] for age in range(min(ORDER, self.index))]


def make_solver(name: str, schedule: Schedule) -> Solver:
    """Make a solver by name. Raises `UsageError` for a name that is not in `request.SOLVERS`."""
    solvers: dict[str, type[UniPC] | type[Euler]] = {"unipc": UniPC, "euler": Euler}
    if name not in solvers:
        raise UsageError(f"unknown solver {name!r}: use one of {', '.join(solvers)}")
    return solvers[name](schedule)


def predictor_order(index: int) -> int:
    """Order of the predictor: the number of clean samples, at most 2.

    The official code also takes the minimum with N - i. That changes only the last step, whose
    result is m_i in any order.
    """
    return min(ORDER, index + 1)


def predictor_weights(sigmas: Sequence[float], i: int) -> list[float]:
    """Weights of (x_i, m_i, m_(i-1)) in x_(i+1); m_j is the clean sample predicted at step j."""
    here, after = sigmas[i], sigmas[i + 1]
    if after == 0:
        return [0.0, 1.0]
    h = _log_snr(after) - _log_snr(here)
    k = -(1 - after) * math.expm1(-h)
    if predictor_order(i) == 1:
        return [after / here, k]
    r = (_log_snr(sigmas[i - 1]) - _log_snr(here)) / h
    return [after / here, k * (1 - 0.5 / r), k * 0.5 / r]


def corrector_weights(sigmas: Sequence[float], i: int) -> list[float]:
    """Weights of (x_(i-1), m_i, m_(i-1), m_(i-2)) in the corrected x_i.

    The order is that of the predictor of x_i.
    """
    before, here = sigmas[i - 1], sigmas[i]
    h = _log_snr(here) - _log_snr(before)
    big_h, b = -h, math.expm1(-h)
    k = -(1 - here) * b
    if predictor_order(i - 1) == 1:
        return [here / before, 0.5 * k, 0.5 * k]
    r = (_log_snr(sigmas[i - 2]) - _log_snr(before)) / h
    g1 = (b / big_h - 1) / b
    g2 = 2 * ((b / big_h - 1) / big_h - 0.5) / b
    c1, c2 = (g1 - g2) / (1 - r), (g2 - r * g1) / (1 - r)
    return [here / before, k * c2, k * (1 - c1 / r - c2), k * c1 / r]


def _log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(sigma)


def _combine(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Sum of weight * tensor in fp32, from left to right."""
    (weight, tensor), *rest = terms
    total = tensor.float() * weight
    for weight, tensor in rest:
        total += tensor.float() * weight
    return total


def _check_unfinished(index: int, sigmas: Sequence[float]) -> None:
    if index >= len(sigmas) - 1:
        raise UsageError(f"the solver has finished all {len(sigmas) - 1} steps: make a new one")


def _loaded_index(
    state: Mapping[str, Tensor | int], sigmas: Sequence[float], keys_at: Callable[[int], set[str]]
) -> int:
    index = int(state.get("index", -1))
    steps = len(sigmas) - 1
    if not 0 <= index <= steps:
        raise ResumeError(
            f"the saved solver is at step {index}, but this run has {steps} steps: start again "
            f"with the same number of steps"
        )
    if set(state) != keys_at(index):
        expected = ", ".join(sorted(keys_at(index)))
        raise ResumeError(
            f"the saved solver has {', '.join(sorted(state))}, expected {expected}: start again "
            f"with the same solver"
        )
    return index
