"""A hard limit on what torch takes of a GPU: what the plan has forgotten is refused, and never
comes out of another program's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def vram_cap(device: torch.device, nbytes: int) -> Iterator[None]:
    """Torch's allocator raises its out-of-memory error rather than reserve `nbytes` more of a CUDA
    device; a CPU has no such limit.

    What it holds on to already, such as the workspace of cuBLAS, was counted with the driver's
    context. A tighter limit that was set before stays, and either way the one from before holds
    again afterwards.
    """
    if device.type != "cuda":
        yield
        return
    # both calls refuse a plain `cuda`
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.empty_cache()  # what is reserved already counts
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
