"""Measure the read speed of a disk with the streamer's own reader, on a temporary file.

Torch is imported inside functions only.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from lowvram.errors import CheckpointError
from lowvram.planner.workspace import READ_SLACK_BYTES

PROBE_BLOCKS = 4
PROBE_BLOCK_BYTES = 64 << 20
PIECE = 1 << 20


def read_speed(folder: Path) -> float | None:
    """Speed in bytes/s of `BlockFile` on the disk of `folder`, without the page cache.

    Writes and removes a file there. None if the page cache cannot be dropped, the file cannot be
    written, or torch cannot be imported.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    place = folder / f".lowvram-probe-{os.getpid()}"
    try:
        if shutil.disk_usage(folder).free < 2 * PROBE_BLOCKS * PROBE_BLOCK_BYTES:
            return None
        _write(place)
        return _timed_read(place)
    except (OSError, ImportError, CheckpointError):
        return None
    finally:
        with suppress(OSError):
            place.unlink(missing_ok=True)


def _write(place: Path) -> None:
    """Write a file of all blocks, sync it and drop it from the page cache."""
    piece = os.urandom(PIECE)
    with place.open("xb", buffering=0) as file:
        for _ in range(PROBE_BLOCKS * PROBE_BLOCK_BYTES // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed_read(place: Path) -> float:
    import torch

    from lowvram.streaming.block_file import BlockFile

    # written once, so that the reads do not include page faults
    buffer = torch.ones(PROBE_BLOCK_BYTES + READ_SLACK_BYTES, dtype=torch.uint8)
    file = BlockFile(
        place, [(block * PROBE_BLOCK_BYTES, PROBE_BLOCK_BYTES) for block in range(PROBE_BLOCKS)]
    )
    try:
        began = time.perf_counter()
        for block in range(PROBE_BLOCKS):
            file.read_into(block, buffer)
        seconds = time.perf_counter() - began
    finally:
        file.close()
    return PROBE_BLOCKS * PROBE_BLOCK_BYTES / max(seconds, 1e-9)
