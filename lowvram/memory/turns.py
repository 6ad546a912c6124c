"""One run at a time per device: a budget is granted to one run, not to each thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowvram.errors import UsageError

_locks: dict[str, threading.RLock] = {}  # by device
_busy: set[str] = set()
_log = logging.getLogger(__name__)


@contextmanager
def only_run(device: torch.device) -> Iterator[None]:
    """Hold `device` for a run of this process; a run of another thread waits until it ends.

    Raises `UsageError` for a run that is started within a run on the same device, such as in its
    listener: it would wait for itself.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    name = str(device)
    lock = _locks.setdefault(name, threading.RLock())
    if not lock.acquire(blocking=False):
        _log.info("waiting for another run of this process on %s", name)
        lock.acquire()
    try:
        if name in _busy:
            raise UsageError(
                f"a run on {name} was started within a run on it: start it when that has ended"
            )
        _busy.add(name)
        try:
            yield
        finally:
            _busy.discard(name)
    finally:
        lock.release()
