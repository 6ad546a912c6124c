"""The reference of `rms_rope_quantize` against independent formulas (promise 18)."""

from __future__ import annotations

import torch
from lowvram_kernels.rms_rope_quantize import rms_rope

from tests.kernels.inputs import random


def test_rms_rope_normalises_over_all_channels_and_turns_adjacent_pairs() -> None:
    x, weight = random(5, 256), random(256, seed=1)
    angles = random(5, 64, seed=2)
    heads = rms_rope(x, weight, angles.cos(), angles.sin(), num_heads=2, eps=1e-6)
    normed = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    pairs = torch.view_as_complex(normed.view(5, 2, 64, 2))
    expected = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    ).reshape(5, 2, 128)
    assert torch.allclose(heads.double(), expected.transpose(0, 1), atol=1e-5)
