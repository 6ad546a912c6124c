"""The exception class of `lowvram_kernels`."""

from __future__ import annotations


class UnsupportedOpError(Exception):
    """The call is unsupported by every allowed backend, or breaks the op's contract."""
