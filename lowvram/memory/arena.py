"""The denoising loop's workspace, and ledgers that account for all large allocations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram.errors import InternalLimitError, OutOfMemoryError
from lowvram.memory.out_of_memory import is_out_of_memory
from lowvram.planner.workspace import Workspace
from lowvram.units import format_memory


class Ledger:
    """Accounts for allocations from one budget, up to `limit_bytes`; records their peak."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0

    def charge(self, label: str, nbytes: int) -> None:
        """Add an allocation. Raises `InternalLimitError` when it exceeds the limit."""
        if self.used_bytes + nbytes > self.limit_bytes:
            raise InternalLimitError(
                f"{label} needs {nbytes} bytes of {self.name}, but {self.used_bytes} of the "
                f"planned {self.limit_bytes} are in use"
            )
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, nbytes: int) -> None:
        """Subtract a freed allocation."""
        self.used_bytes -= nbytes

    def allocate(self, label: str, nbytes: int, device: torch.device) -> Tensor:
        """Charge and allocate a buffer: [nbytes] uint8, uninitialized.

        Raises `InternalLimitError` beyond the limit, `OutOfMemoryError` when the machine has less
        memory than planned.
        """
        self.charge(label, nbytes)
        try:
            return new_buffer(nbytes, device)
        except (RuntimeError, MemoryError, OSError) as error:
            self.release(nbytes)
            if not is_out_of_memory(error):
                raise
            needed = f"{label} needs {format_memory(nbytes)} of {self.name}"
            raise OutOfMemoryError(
                f"{needed}, within the budget but not available on this machine", self.name
            ) from None


def new_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Allocate [nbytes] uint8, uninitialized; used for all memory of blocks and workspace."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Arena:
    """The workspace as one allocation, with typed views of its regions.

    The constructor raises as `Ledger.allocate` does.
    """

    def __init__(self, workspace: Workspace, ledger: Ledger, device: torch.device) -> None:
        self.workspace = workspace
        self._ledger = ledger
        self._bytes = ledger.allocate("the arena", workspace.nbytes, device)

    def view(self, region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous, uninitialized tensor at the start of a region.

        Raises `InternalLimitError` when it does not fit into the region.
        """
        offset, limit = self.workspace.regions[region]
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > limit:
            raise InternalLimitError(
                f"arena region {region} has {limit} bytes, {list(shape)} of {dtype} needs {nbytes}"
            )
        return self._bytes[offset : offset + nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Free the allocation; views that still exist keep it alive."""
        self._ledger.release(self._bytes.numel())
        self._bytes = self._bytes.new_empty(0)
