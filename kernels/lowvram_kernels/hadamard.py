"""The regular Hadamard rotation of 256 channels, as a butterfly of additions (ConvRot; formats 1c,
kernels 1.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels.errors import UnsupportedOpError

GROUP = 256


def rotate(x: Tensor) -> Tensor:
    """y = x R on each 256 neighbouring channels, R = H4 (x) H4 (x) H4 (x) H4, H4 = ones/2 - flipped
    identity.

    x: [..., K] float32, K a multiple of 256. Returns a new [..., K] float32. R is symmetric and its
    own inverse.
    Additions alone, in a fixed order: a row's result depends on no other row and on no thread
    count. Raises `UnsupportedOpError` where K is not a multiple of 256.
    """
    channels = x.shape[-1]
    if channels % GROUP:
        raise UnsupportedOpError(f"rotation needs a multiple of {GROUP} channels, got {channels}")
    y = x.reshape(-1, 4, 4, 4, 4)
    for axis in (1, 2, 3, 4):
        a, b, c, d = y.unbind(axis)
        half = ((a + b) + (c + d)) * 0.5
        y = torch.stack((half - d, half - c, half - b, half - a), dim=axis)
    return y.reshape(x.shape)
