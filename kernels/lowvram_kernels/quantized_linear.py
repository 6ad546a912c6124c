"""Op `quantized_linear`: quantized activations times quantized weights, with a fused epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.constraints import GELU_ALONE
from lowvram_kernels.dispatch import op
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.quantize_rows import gelu_tanh, store
from lowvram_kernels.sizes import output_slices, row_slices


def product(a: Tensor, weight: Tensor) -> Tensor:
    """Return a @ weight^T, exact for int8 and rounded once, to fp32, for e4m3.

    a: [M, K], weight: [N, K], both int8 or both float8_e4m3fn. Returns [M, N] int32 or float32.
    e4m3 is accumulated in fp64, where the additions are exact for K < 2^21. The result therefore
    depends neither on the order of additions nor on the number of rows.
    Raises `UnsupportedOpError` for other or different dtypes.
    """
    if a.dtype != weight.dtype:
        raise UnsupportedOpError(
            f"quantized_linear multiplies equal dtypes, got {a.dtype} and {weight.dtype}"
        )
    if a.dtype == torch.int8:
        return int8_product(a, weight)
    if a.dtype == torch.float8_e4m3fn:
        return (a.to(torch.float64) @ weight.to(torch.float64).t()).float()
    raise UnsupportedOpError(f"quantized_linear multiplies int8 or float8_e4m3fn, got {a.dtype}")


def int8_product(a: Tensor, weight: Tensor) -> Tensor:
    """Return a @ weight^T; [M, K] and [N, K] int8 -> [M, N] int32.

    On CUDA `torch._int_mm` needs more than 16 rows, so shorter inputs are padded.
    """
    rows = a.shape[0]
    if a.is_cuda and rows <= 16:
        a = torch.cat((a, a.new_zeros(17 - rows, a.shape[1])))
    return torch._int_mm(a.contiguous(), weight.t())[:rows]


@op(constraints.quantized_linear)
def quantized_linear(
    a: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gate: Tensor | None = None,
    accumulate: bool = False,
    gelu: bool = False,
) -> None:
    """Compute y = (a @ weight^T) * a_scale * weight_scale^T + bias and store or accumulate it.

    out = y by default, GELU_tanh(y) with `gelu`; with `accumulate` out += y. `gate` multiplies y.
    a: [M, K] and weight: [N, K], both int8 or both float8_e4m3fn; a_scale: [M, 1], weight_scale:
    [N, 1], bias: [N], gate: [N], all float32; out: [M, N] float32, bfloat16 or float16, with
    `accumulate` updated in place. The epilogue is fp32; only the store to `out` rounds, and to
    float16 it clamps (`sizes.FLOAT16_MAX`).
    Raises `UnsupportedOpError` for `gelu` together with `gate` or `accumulate`, and for other or
    different dtypes of a and weight.
    """
    if gelu and (gate is not None or accumulate):
        raise UnsupportedOpError(GELU_ALONE)
    for rows in row_slices(a.shape[0]):
        for outputs in output_slices(weight.shape[0]):
            y = (
                product(a[rows], weight[outputs])
                .float()
                .mul_(a_scale[rows])
                .mul_(weight_scale[outputs].view(1, -1))
            )
            if bias is not None:
                y += bias[outputs]
            if gelu:
                y = gelu_tanh(y)
            if gate is not None:
                y *= gate[outputs]
            if accumulate:
                y += out[rows, outputs]
            store(y, out[rows, outputs])
