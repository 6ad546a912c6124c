"""Formats of the experts' weights, one `Format` each: storage dtype, rotation and marker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Inputs of a linear that are rotated together.
ROTATION_GROUP = 256


@dataclass(frozen=True)
class Format:
    """How the linears of an expert's blocks are stored and multiplied.

    weights: dtype in a safetensors file; rest: dtype of the other linears there, and of activations
    between ops in unquantized formats; marker: the `comfy_quant` JSON of a quantized linear, None
    for unquantized formats; rotated: whether inputs are rotated (ConvRot).
    """

    name: str
    weights: str
    rest: str = "BF16"
    marker: Mapping[str, object] | None = None
    rotated: bool = False

    @property
    def quantized(self) -> bool:
        """Whether weights and activations are 8-bit codes with scales."""
        return self.marker is not None

    @property
    def float_bytes(self) -> int:
        """Bytes of one activation between ops."""
        return 4 if self.rest == "F32" else 2

    @property
    def outside(self) -> str:
        """Dtype of the arithmetic outside the blocks: text encoder, embeddings and text features.

        It is a small part of the work, so quantized formats do not round there.
        """
        return "F32" if self.quantized else self.rest

    @property
    def outside_bytes(self) -> int:
        """Bytes of one value outside the blocks."""
        return 4 if self.outside == "F32" else 2

    @property
    def code_bytes(self) -> int:
        """Bytes of one input value of a linear."""
        return 1 if self.quantized else self.float_bytes


_CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": ROTATION_GROUP}
FORMATS = {
    format.name: format
    for format in (
        Format("int8", "I8", marker=_CONVROT, rotated=True),
        Format("int8-plain", "I8", marker={"format": "int8_tensorwise"}),
        Format("fp8", "F8_E4M3", marker={"format": "float8_e4m3fn"}),
        Format("bf16", "BF16"),
        Format("fp32", "F32", rest="F32"),
    )
}
