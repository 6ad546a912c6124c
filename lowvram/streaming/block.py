"""A block of weights as it lies in its slot: typed views, and one view over neighbours that are
multiplied together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowvram.errors import CheckpointError

# short name -> (dtype, shape, offset from the block's start in bytes)
BlockTensors = Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]


class Adapter(NamedTuple):
    """A low-rank change of a linear: weight + strength * up @ down. down: [R, K]; up: [N, R]."""

    down: Tensor
    up: Tensor
    strength: float


class LinearWeights(NamedTuple):
    """One linear, or several that read the same input, stacked along their outputs.

    weight: [N, K] as stored; scale: [N, 1] float32 of a quantized weight; bias: [N] float32.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


class BlockView:
    """Views into one slot, valid until the streamer moves on."""

    def __init__(self, data: Tensor, tensors: BlockTensors) -> None:
        self._data = data
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` (without its `blocks.i.` prefix), no copy."""
        return self._span(name, (name,))

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`, or None where the format has none."""
        return self[name] if name in self._tensors else None

    def fused(self, names: Sequence[str]) -> Tensor:
        """Neighbouring tensors of equal trailing shape as one, stacked along their first dimension,
        no copy.
        """
        return self._span(names[0], names)

    def linear(self, *names: str) -> LinearWeights:
        """The linears `names`, neighbours in the store, as one; no copy."""

        def part(suffix: str) -> Tensor | None:
            parts = [f"{name}.{suffix}" for name in names]
            return self.fused(parts) if parts[0] in self._tensors else None

        return LinearWeights(
            self.fused([f"{name}.weight" for name in names]), part("weight_scale"), part("bias")
        )

    def close(self) -> None:
        """Lets go of the slot, whoever still holds this view."""
        self._data = self._data.new_empty(0)

    def _span(self, first: str, names: Sequence[str]) -> Tensor:
        dtype, shape, offset = self._tensors[first]
        rows, end = 0, offset
        for name in names:
            other_dtype, other_shape, other_offset = self._tensors[name]
            if (other_dtype, other_shape[1:], other_offset) != (dtype, shape[1:], end):
                raise CheckpointError(
                    f"{', '.join(names)} do not lie side by side in the store: quantize the "
                    f"model again"
                )
            rows += other_shape[0]
            end += math.prod(other_shape) * dtype.itemsize
        return self._data[offset:end].view(dtype).view(rows, *shape[1:])


class Blocks(Protocol):
    """What gives the blocks of a schedule, one after the other."""

    def block(self, component: str, index: int) -> AbstractContextManager[BlockView]:
        """The next block of the schedule, ready to compute with until the context ends."""
