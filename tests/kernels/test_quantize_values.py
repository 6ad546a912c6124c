"""The reference of `quantize_values` (promise 18)."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.quantize_values import SUM_START, VALUE_MAX, quantize_values

from tests.kernels.inputs import poisoned, random, with_outliers


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [
        (torch.int8, 0, 1 / 254),
        (torch.float16, 2**-11, 2**-25),
        (torch.float8_e4m3fn, 2**-4, 2**-10 / 2.25),
    ],
)
def test_values_are_stored_to_half_a_step(
    dtype: torch.dtype, relative: float, absolute: float
) -> None:
    """absolute: relative to the largest value of a tile and channel."""
    v = with_outliers(random(130, 256)) * 1e5  # beyond the range of fp16
    out, scales = poisoned((2, 128, 192), dtype), poisoned((2, 3, 128, 2), torch.float32)
    quantize_values(v, out, scales)
    scale = scales[..., 0].transpose(1, 2)
    if dtype == torch.int8:
        sums = out.double().unflatten(-1, (3, 64)).sum(-1)
        offset = scales[..., 1].transpose(1, 2) + SUM_START * scale.double()
        assert (offset - 128 * sums * scale).abs().max() <= scale.max()  # of 1.5 * 2^23 codes
    stored = (out.float().unflatten(-1, (3, 64)) * scale.unsqueeze(-1)).flatten(-2)
    exact = v.t().reshape(2, 128, 130)
    largest = (scale * VALUE_MAX[dtype]).repeat_interleave(64, dim=-1)[..., :130]
    assert (
        (stored[..., :130] - exact).abs() <= (exact.abs() * relative + largest * absolute) * 1.001
    ).all()
    assert (stored[..., 130:] == 0).all()
    with pytest.raises(
        UnsupportedOpError,
        match=r"values are torch\.int8 or torch\.float16 or torch\.float8_e4m3fn, not torch\.int16",
    ):
        quantize_values(v, torch.empty(2, 128, 192, dtype=torch.int16), scales)


def test_values_need_whole_tiles() -> None:
    with pytest.raises(UnsupportedOpError, match="2 tiles of 64"):
        quantize_values(
            random(65, 256), torch.empty(2, 128, 64, dtype=torch.int8), torch.empty(2, 1, 128, 2)
        )
