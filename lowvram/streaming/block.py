"""Typed views of a block of weights in its slot, also of adjacent tensors as one."""

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
    """Low-rank adapter of a linear: weight + strength * up @ down. down: [R, K]; up: [N, R]."""

    down: Tensor
    up: Tensor
    strength: float


class LinearWeights(NamedTuple):
    """One linear, or several with the same input, stacked along their outputs.

    weight: [N, K] as stored; scale: [N, 1] float32 of a quantized weight, else None; bias: [N]
    float32.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


class BlockView:
    """Views of the tensors of one block in its slot, valid until the slot is released.

    data: the slot, uint8; tensors: dtype, shape and offset of each tensor.
    """

    def __init__(self, data: Tensor, tensors: BlockTensors) -> None:
        self._data = data
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` (without `blocks.i.`), not copied."""
        return self._span(name, (name,))

    def get(self, name: str) -> Tensor | None:
        """The tensor `name`, or None if the format has no such tensor."""
        return self[name] if name in self._tensors else None

    def fused(self, names: Sequence[str]) -> Tensor:
        """Adjacent tensors as one, stacked along their first dimension, not copied.

        Raises `CheckpointError` unless they are adjacent, of one dtype and equal trailing shape.
        """
        return self._span(names[0], names)

    def linear(self, *names: str) -> LinearWeights:
        """Adjacent linears as one, not copied. Raises `CheckpointError` as `fused` does."""

        def part(suffix: str) -> Tensor | None:
            parts = [f"{name}.{suffix}" for name in names]
            return self.fused(parts) if parts[0] in self._tensors else None

        return LinearWeights(
            self.fused([f"{name}.weight" for name in names]), part("weight_scale"), part("bias")
        )

    def close(self) -> None:
        """Drop the reference to the slot, so that this view no longer keeps it alive."""
        self._data = self._data.new_empty(0)

    def _span(self, first: str, names: Sequence[str]) -> Tensor:
        dtype, shape, offset = self._tensors[first]
        rows, end = 0, offset
        for name in names:
            other_dtype, other_shape, other_offset = self._tensors[name]
            if (other_dtype, other_shape[1:], other_offset) != (dtype, shape[1:], end):
                raise CheckpointError(
                    f"{', '.join(names)} are not adjacent in the store: quantize the model again"
                )
            rows += other_shape[0]
            end += math.prod(other_shape) * dtype.itemsize
        return self._data[offset:end].view(dtype).view(rows, *shape[1:])


class Blocks(Protocol):
    """Source of the blocks of a schedule, in its order."""

    def block(self, component: str, index: int) -> AbstractContextManager[BlockView]:
        """The next block of the schedule, ready for computation until the context ends."""
