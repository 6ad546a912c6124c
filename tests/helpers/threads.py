"""Threads of lowvram that the test at work has started."""

from __future__ import annotations

import threading

PREFIX = "lowvram"  # of the name of every thread that lowvram starts
_earlier: set[threading.Thread] = set()


def forget_earlier_threads() -> None:
    """Called before every test: a file that nobody closed ends its readers when it is collected,
    during whichever test that is.
    """
    _earlier.clear()
    _earlier.update(_alive())


def lowvram_threads() -> list[str]:
    """Names of the threads that this test has started and that still run."""
    return sorted(thread.name for thread in _alive() - _earlier)


def _alive() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(PREFIX)}
