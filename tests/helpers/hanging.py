"""A disk that does not answer: reads of blocks that come back only when the test lets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lowvram.streaming.block_file import BlockFile
from tests.helpers.threads import lowvram_threads


class HangingReads:
    """Reads for which `holds(file, offset, end)` do not come back before `release`; `begun`: one of
    them is under way.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        holds: Callable[[BlockFile, int, int], bool] = lambda *_: True,
    ) -> None:
        self.begun, self._released, real = threading.Event(), threading.Event(), BlockFile._pread

        def pread(file: BlockFile, target: memoryview, offset: int) -> int:
            if holds(file, offset, offset + len(target)):
                self.begun.set()
                assert self._released.wait(30), "the test has forgotten its reader"
            return real(file, target, offset)

        monkeypatch.setattr(BlockFile, "_pread", pread)

    def release(self) -> None:
        """Readers end by themselves now."""
        self._released.set()
        until = time.monotonic() + 5
        while lowvram_threads() and time.monotonic() < until:
            time.sleep(0.01)
        assert not lowvram_threads()
