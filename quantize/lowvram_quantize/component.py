"""Convert the tensors of one component to their stored form, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.checkpoint.source import ComponentSource
from lowvram.errors import NonFiniteError
from lowvram.store.layout import ComponentLayout, StoredTensor, marker_bytes
from lowvram_quantize.recipe import ROW_FORMATS
from lowvram_quantize.rows import ErrorSums, RowEngine, cast_rows, quantize_rows


class ComponentMaker:
    """Makes the stored tensors of one component, in any order.

    The scales of a matrix are kept from its quantization until they are requested.
    """

    def __init__(self, source: ComponentSource, layout: ComponentLayout, engine: RowEngine) -> None:
        self._source = source
        self._format = layout.format
        self._engine = engine
        self._scales: dict[str, Tensor] = {}

    def is_lossy(self, stored: StoredTensor) -> bool:
        """Return whether the stored dtype cannot hold every value of the source tensor.

        For such tensors `make` returns an error.
        """
        cast = stored.role == "copy" and stored.dtype not in (
            "F32",
            self._source.tensors[stored.source].dtype,
        )
        return cast or stored.role == "weight"

    def make(self, stored: StoredTensor) -> tuple[Tensor, ErrorSums | None]:
        """Return the tensor as it is stored, and its error if it `is_lossy`, else None.

        Raises `NonFiniteError` if the rotation overflows.
        """
        if stored.role == "weight":
            codes, self._scales[stored.source], error = self._quantize(stored.source)
            return codes, error
        if stored.role == "scale":
            scales = self._scales.pop(stored.source, None)
            return (self._quantize(stored.source)[1] if scales is None else scales), None
        if stored.role == "marker":
            return torch.frombuffer(bytearray(marker_bytes(self._format)), dtype=torch.uint8), None
        dtype = TORCH_DTYPES[stored.dtype]
        if not self.is_lossy(stored):
            return self._source.read(stored.source).to(dtype), None
        cast, error = cast_rows(self._engine, self._source.rows(stored.source), dtype)
        return cast.reshape(stored.shape), error

    def _quantize(self, name: str) -> tuple[Tensor, Tensor, ErrorSums]:
        try:
            return quantize_rows(self._engine, self._source.rows(name), ROW_FORMATS[self._format])
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._source.component} {name}: {error}") from error
