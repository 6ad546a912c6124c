"""Op `adaln_quantize`: LayerNorm, modulation, optional rotation and per-row quantization.

The result is the shared input of the q, k and v projections, and that of ffn.0.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.dispatch import op
from lowvram_kernels.quantize_rows import slices_of, store_quantized
from lowvram_kernels.sizes import row_slices


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return LayerNorm(x) * scale + shift.

    x: [M, D] float; scale, shift: [D] or [M, D] float32. LayerNorm has no affine parameters and
    runs over the last dimension in fp32. Returns [M, D] float32.
    """
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps) * scale + shift


@op(constraints.adaln_quantize)
def adaln_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> None:
    """Compute out, out_scale = quantize(LayerNorm(x) * scale + shift).

    x: [M, D] float32 or bfloat16; scale, shift: [D] float32, where `scale` is the model's
    1 + scale, added by the caller; out: [M, D] int8 or float8_e4m3fn; out_scale: [M, 1] float32.
    `rotated`: apply the Hadamard rotation before quantizing; D must be a multiple of 256.
    low, low_scale: a second int8 code, see `quantize_rows.store_quantized`.
    LayerNorm is over D with biased variance (spec 2.1). All arithmetic before the final rounding
    is fp32.
    """
    for rows in row_slices(*x.shape):
        store_quantized(
            adaln(x[rows], scale, shift, eps),
            out[rows],
            out_scale[rows],
            rotated,
            *slices_of(rows, low, low_scale),
        )
