"""ConvRot: rotation by the regular 256x256 Hadamard matrix, which spreads outliers over a group.

`R = H4 ⊗ H4 ⊗ H4 ⊗ H4`, `H4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2`: symmetric and
orthogonal, so `R·R = I` and `(x·R)·(W·R)ᵀ = x·Wᵀ`. The source of the format is comfy-kitchen's
`int8_tensorwise` with `convrot`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.formats import ROTATION_GROUP

_H4 = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))
_STAGES = 4  # 4^4 = 256


def rotation_matrix() -> Tensor:
    """Return R as a dense matrix, [256, 256] fp32 with elements ±1/16, to test `rotate_`."""
    h4 = torch.tensor(_H4) / 2
    matrix = torch.ones(1, 1)
    for _ in range(_STAGES):
        matrix = torch.kron(matrix, h4)
    return matrix


def rotate_(x: Tensor, other: Tensor, half: Tensor) -> None:
    """Compute `x <- x·R` in place, in each group of 256 along the last axis.

    x, other: fp32, contiguous, the same number of elements; half: fp32, half as many. `other` and
    `half` are overwritten. The sums are elementwise fp32 additions in a fixed order, scaled once by
    1/16, so that the result does not depend on threads, chunks or the machine. Each stage
    transforms the leading base-4 digit of the index and moves it to the end; four stages restore
    the order.
    """
    left, right = half.view(2, -1, ROTATION_GROUP // 4)
    for _ in range(_STAGES):
        x0, x1, x2, x3 = x.view(-1, 4, ROTATION_GROUP // 4).unbind(1)
        y0, y1, y2, y3 = other.view(-1, ROTATION_GROUP // 4, 4).unbind(2)
        torch.add(x0, x1, out=left)
        torch.sub(x2, x3, out=right)
        torch.add(left, right, out=y0)
        torch.sub(left, right, out=y1)
        torch.add(x2, x3, out=left)
        torch.sub(x0, x1, out=right)
        torch.add(left, right, out=y2)
        torch.sub(left, right, out=y3)
        x, other = other, x
    x.mul_(1 / 16)  # exact: a power of two


def rotate(x: Tensor) -> Tensor:
    """Return `x·R` for each group of 256 along the last axis, as a new fp32 tensor."""
    rotated = x.to(torch.float32, copy=True).contiguous()
    rotate_(rotated, torch.empty_like(rotated), rotated.new_empty(rotated.numel() // 2))
    return rotated
