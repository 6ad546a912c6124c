"""The reference of `adaln_quantize` against LayerNorm and modulation (promise 18)."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.adaln_quantize import adaln_quantize

from tests.kernels.inputs import RAGGED, dense_rotation, poisoned, random


@pytest.mark.parametrize("rows", RAGGED)
def test_adaln_quantize_is_layer_norm_and_modulation(rows: int) -> None:
    x, scale, shift = random(rows, 256), random(256, seed=1), random(256, seed=2)
    out, out_scale = poisoned((rows, 256), torch.int8), poisoned((rows, 1), torch.float32)
    adaln_quantize(x, scale, shift, out, out_scale, eps=1e-6, rotated=True)
    wide = x.double()
    normed = (wide - wide.mean(1, keepdim=True)) / (
        wide.var(1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    expected = (normed * scale + shift) @ dense_rotation()
    assert ((out.double() * out_scale - expected).abs() <= out_scale * 0.51).all()
