"""Official sigmas and timesteps as numbers (spec section 5.1), and the expert of each timestep."""

from __future__ import annotations

from lowvram.variants import EXPERTS

NUM_TRAIN_TIMESTEPS = 1000
FIRST_SIGMA = 0.9990000128746033  # 0.999 as fp32: the official scheduler keeps it in a tensor


def shifted(sigma: float, shift: float) -> float:
    """shift * sigma / (1 + (shift - 1) * sigma)"""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigmas(steps: int, shift: float) -> list[float]:
    """Sigma of every step: shifted(FIRST_SIGMA * (1 - i / N)), in fp64."""
    spacing = -FIRST_SIGMA / steps  # added as numpy.linspace adds it, for the same last bit
    return [shifted(i * spacing + FIRST_SIGMA, shift) for i in range(steps)]


def timesteps(steps: int, shift: float) -> list[int]:
    """The model's input timestep of every step: trunc(1000 * sigma)."""
    return [int(NUM_TRAIN_TIMESTEPS * sigma) for sigma in sigmas(steps, shift)]


def expert_of(timestep: int, boundary: float) -> str:
    """`high_noise` while the integer timestep >= boundary * 1000, then `low_noise`."""
    return EXPERTS[0] if int(timestep) >= boundary * NUM_TRAIN_TIMESTEPS else EXPERTS[1]


def high_noise_steps(steps: int, shift: float, boundary: float) -> int:
    """Number of steps of the high-noise expert."""
    return sum(expert_of(timestep, boundary) == EXPERTS[0] for timestep in timesteps(steps, shift))
