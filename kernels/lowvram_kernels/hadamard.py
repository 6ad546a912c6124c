"""Hadamard rotations: of groups of 256 channels (ConvRot; formats 1c, kernels 1.3), and of the
channels of attention's heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels.errors import UnsupportedOpError

GROUP = 256
HEAD_GROUP = 64


def rotate(x: Tensor) -> Tensor:
    """Return x R for each group of 256 adjacent channels.

    R = H4 (x) H4 (x) H4 (x) H4 (Kronecker products), H4 = ones / 2 - flipped identity; R is
    symmetric and its own inverse. x: [..., K] float32, K a multiple of 256. Returns [..., K]
    float32, a new tensor. Computed as a butterfly of additions in a fixed order, so that a row's
    result depends neither on other rows nor on the number of threads.
    Raises `UnsupportedOpError` if K is not a multiple of 256.
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


def turn_heads(x: Tensor) -> Tensor:
    """Return x R for each group of 64 adjacent channels of queries or keys.

    R = A (x) A (x) A, A = ones / 2 - identity of size 4: symmetric and its own inverse. The
    products of turned queries and keys are those of the queries and keys; their channels are of
    more equal size, so that rounding to int8 loses half as much. x: [..., head_dim] float32,
    head_dim a multiple of 64. Returns a new tensor. The order of additions is fixed, as in
    `rotate`.
    """
    y = x.reshape(-1, 4, 4, 4)
    for axis in (1, 2, 3):
        a, b, c, d = y.unbind(axis)
        half = ((a + b) + (c + d)) * 0.5
        y = torch.stack((half - a, half - b, half - c, half - d), dim=axis)
    return y.reshape(x.shape)
