"""Open safetensors files."""

from __future__ import annotations

from pathlib import Path

from lowvram.checkpoint.readers.safetensors_header import Header, read_header
from lowvram.checkpoint.readers.tensor_data import TensorData


class TensorFile(TensorData):
    """An open safetensors file with a checked header. The constructor raises `CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self.header: Header = read_header(path)
        super().__init__(path, self.header.tensors, self.header.file_bytes)

    @property
    def metadata(self) -> dict[str, str]:
        """The header's `__metadata__`."""
        return self.header.metadata
