"""Op `rms_rope_quantize`: RMSNorm, rotary embedding, smoothing and quantization of q and k."""

from __future__ import annotations

from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.dispatch import op
from lowvram_kernels.hadamard import turn_heads
from lowvram_kernels.quantize_rows import INT8_MAX, SMALLEST_ABSMAX
from lowvram_kernels.sizes import row_slices


def rms_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, eps: float
) -> Tensor:
    """Return RoPE(x / sqrt(mean(x^2) + eps) * weight), split into heads.

    x: [M, D] float; weight: [D] float32; cos, sin: [M, D / num_heads / 2] float32, or None for no
    rotary embedding. Returns [num_heads, M, D / num_heads] float32. RMSNorm is over all D channels,
    before the split (spec 2.1); the rotated pairs are adjacent channels (2j, 2j+1) of a head
    (spec 2.2).
    """
    x = x.float()
    normed = x * ((x * x).mean(dim=-1, keepdim=True) + eps).rsqrt() * weight
    heads = normed.view(x.shape[0], num_heads, -1)
    if cos is not None and sin is not None:
        pairs = heads.unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)  # [M, 1, head_dim / 2]
        rotated = heads.new_empty(pairs.shape)
        rotated[..., 0] = even * c - odd * s
        rotated[..., 1] = even * s + odd * c
        heads = rotated.flatten(-2)
    return heads.transpose(0, 1)


@op(constraints.rms_rope_quantize)
def rms_rope_quantize(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    smoothing: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
) -> None:
    """Compute out, out_scale = quantize(turn_heads(rms_rope(x) - smoothing)).

    There is one scale per token and head.

    x, weight, cos, sin: as in `rms_rope`; smoothing: [H, head_dim] float32 or None (subtracting the
    same vector from every key does not change the softmax); out: [H, M, head_dim] int8; out_scale:
    [H, M] float32. out and out_scale may be strided views.
    """
    for rows in row_slices(*x.shape):
        angles = (None, None) if cos is None or sin is None else (cos[rows], sin[rows])
        heads = rms_rope(x[rows], weight, *angles, num_heads=out.shape[0], eps=eps)
        if smoothing is not None:
            heads = heads - smoothing.unsqueeze(1)
        heads = turn_heads(heads)
        scale = heads.abs().amax(dim=-1).clamp_(min=SMALLEST_ABSMAX) / INT8_MAX
        out[:, rows] = (heads / scale.unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
        out_scale[:, rows] = scale
