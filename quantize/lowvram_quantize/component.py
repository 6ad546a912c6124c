"""Makes the stored tensors of one component out of its source, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.checkpoint.readers.safetensors import TORCH_DTYPES
from lowvram.checkpoint.source import ComponentSource
from lowvram.errors import NonFiniteError
from lowvram.store.layout import ComponentLayout, StoredTensor, marker_bytes
from lowvram_quantize.recipe import ROW_FORMATS
from lowvram_quantize.rows import ErrorSums, RowEngine, cast_rows, quantize_rows


class ComponentMaker:
    """Any stored tensor in any order; the scales of a matrix are kept from its making until they
    are asked for.
    """

    def __init__(self, source: ComponentSource, layout: ComponentLayout, engine: RowEngine) -> None:
        self._source = source
        self._format = layout.format
        self._engine = engine
        self._scales: dict[str, Tensor] = {}

    def loses(self, stored: StoredTensor) -> bool:
        """Whether `make` measures an error: what is stored cannot hold every value of its
        source.
        """
        cast = stored.role == "copy" and stored.dtype not in (
            "F32",
            self._source.tensors[stored.source].dtype,
        )
        return cast or stored.role == "weight"

    def make(self, stored: StoredTensor) -> tuple[Tensor, ErrorSums | None]:
        """The tensor as it is stored, and its error where it `loses`. Raises `NonFiniteError` where
        the rotation overflows.
        """
        if stored.role == "weight":
            codes, self._scales[stored.source], error = self._quantize(stored.source)
            return codes, error
        if stored.role == "scale":
            scales = self._scales.pop(stored.source, None)
            return (self._quantize(stored.source)[1] if scales is None else scales), None
        if stored.role == "marker":
            return torch.frombuffer(bytearray(marker_bytes(self._format)), dtype=torch.uint8), None
        tensor, dtype = self._source.read(stored.source), TORCH_DTYPES[stored.dtype]
        return (
            cast_rows(self._engine, tensor, dtype)
            if self.loses(stored)
            else (tensor.to(dtype), None)
        )

    def _quantize(self, name: str) -> tuple[Tensor, Tensor, ErrorSums]:
        try:
            return quantize_rows(self._engine, self._source.read(name), ROW_FORMATS[self._format])
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._source.component} {name}: {error}") from error
