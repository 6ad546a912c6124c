"""All ops as functions; each is defined in its own module with its contract and torch reference."""

from __future__ import annotations

from lowvram_kernels.adaln_quantize import adaln_quantize
from lowvram_kernels.attention_int8 import attention_int8
from lowvram_kernels.dispatch import OPS
from lowvram_kernels.quantize_rows import gelu_quantize, quantize_rows
from lowvram_kernels.quantize_values import quantize_values
from lowvram_kernels.quantized_linear import quantized_linear
from lowvram_kernels.rms_rope_quantize import rms_rope_quantize

__all__ = [
    "OPS",
    "adaln_quantize",
    "attention_int8",
    "gelu_quantize",
    "quantize_rows",
    "quantize_values",
    "quantized_linear",
    "rms_rope_quantize",
]

# Order them as a block uses them, independent of the order of imports.
for _name in (
    "adaln_quantize",
    "quantize_rows",
    "gelu_quantize",
    "quantized_linear",
    "rms_rope_quantize",
    "quantize_values",
    "attention_int8",
):
    OPS[_name] = OPS.pop(_name)
