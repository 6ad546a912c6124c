"""Cap torch's allocator at the planned VRAM; unplanned allocations fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def vram_cap(device: torch.device, nbytes: int) -> Iterator[None]:
    """Cap torch's allocator at `nbytes` more than it has reserved on a CUDA device.

    Allocations beyond the cap raise torch's out-of-memory error. Memory that is already reserved,
    such as the workspace of cuBLAS, belongs to the driver's context in the plan. A lower cap that
    was set before stays in force. On exit the previous cap is restored. No effect on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    # the calls below need a device index
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.empty_cache()  # cached memory counts as reserved
    before = torch.cuda.get_per_process_memory_fraction(index)
    share = (nbytes + torch.cuda.memory_reserved(index)) / torch.cuda.get_device_properties(
        index
    ).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, max(0.0, share)), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)
        torch.cuda.empty_cache()
