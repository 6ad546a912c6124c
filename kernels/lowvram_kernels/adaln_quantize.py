"""LayerNorm, modulation, rotation and row quantization: the shared input of q, k and v."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.dispatch import op
from lowvram_kernels.quantize_rows import store_quantized
from lowvram_kernels.sizes import row_slices


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LN(x) * scale + shift, LN without affine over the last dimension; x: [M, D] float; scale,
    shift: [D] or [M, D] float32.
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
) -> None:
    """out, out_scale = quantize(LN(x) * scale + shift); the caller has added the 1 of (1 + scale).

    x: [M, D] float32 or bfloat16; scale, shift: [D] float32; out: [M, D] int8 or float8_e4m3fn;
    out_scale: [M, 1] float32. LN is over D with biased variance (spec 2.1); everything up to the
    one rounding is fp32.
    """
    for rows in row_slices(*x.shape):
        store_quantized(adaln(x[rows], scale, shift, eps), out[rows], out_scale[rows], rotated)
