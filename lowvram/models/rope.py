"""Angles of the 3-D rotary embedding (spec 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


class RopeTable:
    """Tables of cos and sin per axis, from which `at` gathers the angles of a chunk of tokens.

    grid: (frames, rows, columns) of tokens, columns fastest. Angles are computed in fp64; cos and
    sin are stored in fp32.
    """

    def __init__(self, grid: tuple[int, int, int], head_dim: int, device: torch.device) -> None:
        side = 2 * (head_dim // 6)
        self._grid = grid
        self._tables = []
        for length, width in zip(grid, (head_dim - 2 * side, side, side), strict=True):
            exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
            angles = (
                torch.arange(length, dtype=torch.float64)[:, None] * (10000.0**-exponents)[None]
            )
            self._tables.append((angles.cos().float().to(device), angles.sin().float().to(device)))

    def at(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of tokens, each [M, head_dim / 2] float32; tokens: [M] int64 indices."""
        _, rows, columns = self._grid
        positions = (tokens // (rows * columns), tokens // columns % rows, tokens % columns)
        cos, sin = (
            torch.cat(
                [
                    table[part][position]
                    for table, position in zip(self._tables, positions, strict=True)
                ],
                dim=1,
            )
            for part in (0, 1)
        )
        return cos, sin
