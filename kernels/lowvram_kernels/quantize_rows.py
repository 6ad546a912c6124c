"""Dynamic quantization of activations, one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.errors import UnsupportedError
from lowvram_kernels.hadamard import rotate

INT8_MAX = 127.0
E4M3_MAX = 448.0
# A row of zeros gets this absmax, so that its scale is finite and its codes are zero.
SMALLEST_ABSMAX = 1e-12


def store_quantized(rows: Tensor, out: Tensor, out_scale: Tensor, rotated: bool) -> None:
    """out = round(rows / s), out_scale = s = absmax(row) / 127 (int8) or / 448 (e4m3), after the rotation where asked.

    rows: [M, K] float32; out: [M, K] int8 or float8_e4m3fn; out_scale: [M, 1] float32. Rounds half to even.
    """
    if rotated:
        rows = rotate(rows)
    absmax = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_ABSMAX)
    if out.dtype == torch.int8:
        out_scale.copy_(absmax / INT8_MAX)
        out.copy_((rows / out_scale).round_().clamp_(-INT8_MAX, INT8_MAX))
    elif out.dtype == torch.float8_e4m3fn:
        out_scale.copy_(absmax / E4M3_MAX)
        out.copy_((rows / out_scale).clamp_(-E4M3_MAX, E4M3_MAX))
    else:
        raise UnsupportedError(f"activations are quantized to int8 or float8_e4m3fn, not {out.dtype}")


def quantize_rows(x: Tensor, out: Tensor, out_scale: Tensor, *, rotated: bool) -> None:
    """out, out_scale = quantize(x): one symmetric scale per row.

    x: [M, K] float; out: [M, K] int8 or float8_e4m3fn; out_scale: [M, 1] float32. Arithmetic in fp32.
    """
    store_quantized(x.float(), out, out_scale, rotated)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3); x: float32."""
    u = (x + 0.044715 * (x * x * x)) * 1.5957691216057308  # 2 sqrt(2/pi)
    return x / ((-u).exp() + 1.0)


def gelu_quantize(x: Tensor, out: Tensor, out_scale: Tensor, *, rotated: bool) -> None:
    """out, out_scale = quantize(GELU_tanh(x)): the input of ffn.2. Shapes and rounding as `quantize_rows`."""
    store_quantized(gelu_tanh(x.float()), out, out_scale, rotated)
