"""The one workspace of the denoising loop, and the ledger that every large allocation goes
through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram.errors import InternalLimitError, OutOfMemoryError
from lowvram.memory.out_of_memory import is_out_of_memory
from lowvram.planner.workspace import Workspace
from lowvram.units import format_bytes


class Ledger:
    """Counts what is handed out of one budget and refuses what the plan did not grant.

    Raises `InternalLimitError` where an allocation would exceed `limit_bytes`.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0

    def charge(self, label: str, nbytes: int) -> None:
        if self.used_bytes + nbytes > self.limit_bytes:
            raise InternalLimitError(
                f"{label} asks {nbytes} bytes of {self.name}, but {self.used_bytes} of the "
                f"planned {self.limit_bytes} are in use"
            )
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, nbytes: int) -> None:
        self.used_bytes -= nbytes

    def allocate(self, label: str, nbytes: int, device: torch.device) -> Tensor:
        """[nbytes] uint8, uninitialised, charged to this budget. Raises `OutOfMemoryError` where
        the machine has less than planned.
        """
        self.charge(label, nbytes)
        try:
            return new_buffer(nbytes, device)
        except (RuntimeError, MemoryError, OSError) as error:
            self.release(nbytes)
            if not is_out_of_memory(error):
                raise
            asked = f"{label} asks {format_bytes(nbytes)} of {self.name}"
            raise OutOfMemoryError(
                f"{asked}, which the budget grants and the machine has not", self.name
            ) from None


def new_buffer(nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8, uninitialised: the one place where the memory of blocks and workspace comes
    from.
    """
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Arena:
    """Typed views into one planned allocation. Nothing else is allocated while the loop runs."""

    def __init__(self, workspace: Workspace, ledger: Ledger, device: torch.device) -> None:
        self.workspace = workspace
        self._ledger = ledger
        self._bytes = ledger.allocate("the arena", workspace.nbytes, device)

    def view(self, region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`shape` of `dtype` at the start of `region`, contiguous, uninitialised. Raises
        `InternalLimitError` past the region's end.
        """
        offset, limit = self.workspace.regions[region]
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > limit:
            raise InternalLimitError(
                f"arena region {region} holds {limit} bytes, {list(shape)} of {dtype} needs "
                f"{nbytes}"
            )
        return self._bytes[offset : offset + nbytes].view(dtype).view(shape)

    def close(self) -> None:
        self._ledger.release(self._bytes.numel())
        self._bytes = self._bytes.new_empty(0)
