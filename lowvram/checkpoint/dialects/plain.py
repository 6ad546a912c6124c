"""Weights stored as they are, in a floating-point dtype."""

from __future__ import annotations

import torch

from lowvram.checkpoint.readers.table import TensorReader


def read_plain(reader: TensorReader, name: str) -> torch.Tensor:
    """The tensor in the dtype of its file, mapped where the format allows."""
    return reader.read(name)
