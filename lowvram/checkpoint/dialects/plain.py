"""Weights stored as they are, in a floating-point dtype."""

from __future__ import annotations

from lowvram.checkpoint.readers.shards import RawTensors
from lowvram.checkpoint.readers.tensor_data import Rows


def plain_rows(raw: RawTensors, name: str) -> Rows:
    """The tensor in the dtype of its file."""
    return raw.rows(name)
