"""torch's caching allocator as c10/cuda/CUDACachingAllocator.cpp has it, for machines without a
GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
Block = list[int]  # [offset, bytes, whether it is in use]


class Segments:
    """Best fit among free blocks, else a new segment; a freed block joins free neighbours; only
    `empty` gives segments back.
    """

    def __init__(self) -> None:
        self._segments: list[tuple[bool, list[Block]]] = []
        self.reserved = self.peak_reserved = self.used = 0

    def allocate(self, nbytes: int) -> Callable[[], None]:
        """Returns what frees the block."""
        size = max(512, -(-nbytes // 512) * 512)
        small = size <= MIB
        fits = [
            (block[1], number, place)
            for number, (kind, blocks) in enumerate(self._segments)
            for place, block in enumerate(blocks)
            if kind == small and not block[2] and block[1] >= size
        ]
        if fits:
            _, number, place = min(fits)
            blocks = self._segments[number][1]
        else:
            whole = (
                2 * MIB
                if small
                else 20 * MIB
                if size < 10 * MIB
                else -(-size // (2 * MIB)) * 2 * MIB
            )
            blocks, place = [[0, whole, False]], 0
            self._segments.append((small, blocks))
            self.reserved += whole
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = blocks[place]
        rest = block[1] - size
        if rest >= 512 if small else rest > MIB:
            blocks.insert(place + 1, [block[0] + size, rest, False])
            block[1] = size
        block[2] = True
        self.used += block[1]
        return lambda: self._free(blocks, block)

    def _free(self, blocks: list[Block], block: Block) -> None:
        block[2] = False
        self.used -= block[1]
        joined: list[Block] = []
        for each in blocks:
            if joined and not joined[-1][2] and not each[2]:
                joined[-1][1] += each[1]
            else:
                joined.append(each)
        blocks[:] = joined

    def empty(self) -> None:
        """torch.cuda.empty_cache"""
        self._segments = [
            (kind, blocks) for kind, blocks in self._segments if any(block[2] for block in blocks)
        ]
        self.reserved = sum(block[1] for _, blocks in self._segments for block in blocks)


class Replay(TorchDispatchMode):
    """While it is entered, every tensor that an operator makes on a device of this type takes its
    memory from `segments`.
    """

    def __init__(self, segments: Segments, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.segments = segments
        self._device_type = device_type
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device_type:
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._known and storage.nbytes():
            self._known.add(address)
            free = self.segments.allocate(storage.nbytes())
            weakref.finalize(storage, self._forget, address, free)

    def _forget(self, address: int, free: Callable[[], None]) -> None:
        self._known.discard(address)
        free()
