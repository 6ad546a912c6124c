"""Inputs and outputs of the reference tests: ragged sizes, outlier channels, poisoned outputs."""

from __future__ import annotations

import torch

RAGGED = [1, 33, 100]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an output that shows unwritten elements: NaN, or 0x5A for integers and fp8."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, 0x5A, dtype=torch.uint8).view(dtype)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., ::128] *= 30
    return x


def far_heads(rows: int, columns: int) -> torch.Tensor:
    """Return [3, rows, columns] int8 whose heads are 2^30 elements apart.

    The memory between them is reserved but never touched.
    """
    stride = 2**30 + 256
    return torch.empty(2 * stride + rows * columns, dtype=torch.int8).as_strided(
        (3, rows, columns), (stride, columns, 1)
    )


def dense_rotation() -> torch.Tensor:
    h4 = (
        torch.tensor(
            [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64
        )
        / 2
    )
    r = h4
    for _ in range(3):
        r = torch.kron(r, h4)
    return r
