"""The file formats that are read, one row each: suffix and how a file is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lowvram.checkpoint.readers.pickle import PickleFile
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.checkpoint.readers.safetensors_header import TensorInfo
from lowvram.checkpoint.readers.tensor_data import Rows


class TensorReader(Protocol):
    """An open file of tensors. tensors: dtypes, shapes and places by name."""

    tensors: dict[str, TensorInfo]

    @property
    def metadata(self) -> dict[str, str]:
        """Texts stored with the tensors."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises `CheckpointError`."""

    def rows(self, name: str) -> Rows:
        """One tensor as a matrix whose rows are read when they are asked for."""

    def sample(self, name: str) -> bytes:
        """Data of one tensor that tell whether it was replaced. Raises `CheckpointError`."""

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""


@dataclass(frozen=True)
class FileFormat:
    """suffix: of the file's name; open: from its path, and whether pickles are allowed."""

    suffix: str
    open: Callable[[Path, bool], TensorReader]


# In the order of preference, where a component lies in several.
READERS = (
    FileFormat(".safetensors", lambda path, allow_pickle: TensorFile(path)),
    FileFormat(".pth", PickleFile),
)
