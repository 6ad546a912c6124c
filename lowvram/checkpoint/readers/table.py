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


class TensorReader(Protocol):
    """An open file of tensors, by their names in it."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Dtypes, shapes and places by tensor name."""

    @property
    def metadata(self) -> dict[str, str]:
        """Texts stored with the tensors."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises `CheckpointError`."""

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
