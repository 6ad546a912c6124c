"""Weights stored as they are, in a floating-point dtype."""

from __future__ import annotations

import torch

from lowvram.checkpoint.readers.shards import RawTensors


def read_plain(raw: RawTensors, name: str) -> torch.Tensor:
    """The tensor in the dtype of its file, mapped where the file format allows."""
    return raw.read(name)
