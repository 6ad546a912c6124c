"""The error of this package, which imports nothing of lowvram."""

from __future__ import annotations


class UnsupportedOpError(Exception):
    """No backend can run the call, or its arguments break the op's contract; the message says
    why.
    """
