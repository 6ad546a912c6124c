"""Triton kernel of `quantized_linear`: a tensor-core GEMM with the epilogue in registers.

int8 is accumulated in int32 over all of K, e4m3 in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowvram_kernels import quantize_rows
from lowvram_kernels.common_triton import (
    AFTER_3_7,
    ROUND,
    e4m3_as_float16,
    rounded_product,
    scalar_products,
    stored,
)
from lowvram_kernels.tuning import LinearTile, architecture, linear_kind, linear_tile

C0, C1, C2, C3, C4, C5 = (tl.constexpr(value) for value in quantize_rows.EXP2)
GELU_EXPONENT = tl.constexpr(quantize_rows.GELU_EXPONENT)


@triton.jit
def gelu_tanh(x):
    """Compute `quantize_rows.gelu_tanh` in fp32, bit-identical to the reference."""
    t = tl.minimum(tl.maximum((x + 0.044715 * (x * x * x)) * GELU_EXPONENT, -126.0), 126.0)
    shifted = t + ROUND  # its low bits are the integer nearest to t
    r = t - (shifted - ROUND)
    power = ((((r * C5 + C4) * r + C3) * r + C2) * r + C1) * r + C0
    power = (power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(
        tl.float32, bitcast=True
    )
    return tl.div_rn(x, power + 1.0)


@triton.jit
def grouped_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return this program's tile (m, n) in an order grouped by GROUP_M rows of tiles.

    Programs that run together then share weights in the L2 cache.
    """
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def row_pointers(base, rows, stride):
    """Return base + rows * stride, computed in int64: activations can exceed 2^31 elements."""
    return base + rows.to(tl.int64) * stride


@triton.jit
def column_halves(x):
    """Return the left and the right half of the columns of x [rows, columns]."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_columns(
    products,
    rows,
    first,
    a_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    gate_ptr,
    out_ptr,
    M,
    N,
    stride_out,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DECODE: tl.constexpr,
    PARTS: tl.constexpr,
    SCALAR: tl.constexpr,
):
    """Apply the epilogue to products [rows, columns] and store them; `first`: their first column.

    PARTS: a power of two; the columns are taken in so many parts, one after the other, which need
    fewer registers than the whole.
    """
    if PARTS > 1:
        left, right = column_halves(products)
        for half in tl.static_range(2):
            store_columns(
                right if half else left,
                rows,
                first + half * right.shape[1],
                a_scale_ptr,
                w_scale_ptr,
                bias_ptr,
                gate_ptr,
                out_ptr,
                M,
                N,
                stride_out,
                HAS_BIAS,
                GELU,
                HAS_GATE,
                ACCUMULATE,
                DECODE,
                PARTS // 2,
                SCALAR,
            )
            if half == 0:  # else the compiler overlaps the halves again
                tl.debug_barrier()
    else:
        columns = first + tl.arange(0, products.shape[1])
        y = products.to(tl.float32)
        if DECODE:
            y = y * 65536.0  # both operands were decoded as 2^-8 of their value
        inside = columns < N
        y = y * tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
        w_scale = tl.load(w_scale_ptr + columns, mask=inside, other=0.0)
        y = rounded_product(y, w_scale[None, :], SCALAR)
        if HAS_BIAS:
            y = y + tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
        if GELU:
            y = gelu_tanh(y)
        if HAS_GATE:
            gate = tl.load(gate_ptr + columns, mask=inside, other=0.0)
            y = rounded_product(y, gate[None, :], SCALAR)
        out_ptrs = row_pointers(out_ptr, rows, stride_out)[:, None] + columns[None, :]
        mask = (rows < M)[:, None] & inside[None, :]
        if ACCUMULATE:
            y = tl.load(out_ptrs, mask=mask, other=0.0) + y
        tl.store(out_ptrs, stored(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    gate_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_a,
    stride_w,
    stride_out,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INT8: tl.constexpr,
    DECODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    SCALAR: tl.constexpr,
):
    """Compute one [BLOCK_M, BLOCK_N] tile of out.

    DECODE: the operands are e4m3 bytes, multiplied as fp16. EVEN_K: BLOCK_K divides K. PARTS: as
    in `store_columns`. SCALAR: as in `rounded_product`.
    """
    tile_m, tile_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the last one, so the loop needs no mask for them. The
    # stores are masked.
    a_ptrs = row_pointers(a_ptr, tl.minimum(rows, M - 1), stride_a)[:, None] + k[None, :]
    w_ptrs = row_pointers(w_ptr, tl.minimum(columns, N - 1), stride_w)[None, :] + k[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INT8 else tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a, w = tl.load(a_ptrs), tl.load(w_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(start + k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + k < K)[:, None], other=0.0)
        if INT8:
            accumulator = tl.dot(a, w, accumulator, out_dtype=tl.int32)
        elif DECODE:
            accumulator = tl.dot(e4m3_as_float16(a), e4m3_as_float16(w), accumulator)
        else:
            # sm_90 accumulates with about 14 bits inside the tensor core, so the sum is moved to
            # fp32 registers after each tile of K.
            accumulator = tl.dot(a, w, accumulator, max_num_imprecise_acc=BLOCK_K)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    store_columns(
        accumulator,
        rows,
        tile_n * BLOCK_N,
        a_scale_ptr,
        w_scale_ptr,
        bias_ptr,
        gate_ptr,
        out_ptr,
        M,
        N,
        stride_out,
        HAS_BIAS,
        GELU,
        HAS_GATE,
        ACCUMULATE,
        DECODE,
        PARTS,
        SCALAR,
    )


def tile_of(arch: str, kind: str) -> LinearTile:
    """Return the tile of an architecture with the version of Triton that runs."""
    return linear_tile(arch, kind, prefetches=AFTER_3_7 and arch.startswith("sm_8"))


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
    """Triton implementation of `quantized_linear.quantized_linear`; same contract.

    int8 results are bit-identical to the reference's: the integer sums are exact, and the epilogue
    has the same order of operations without fusion (`enable_fp_fusion=False`). e4m3 is accumulated
    in fp32 in the order of K; one tile shape serves every M, so the number of rows changes no bit.
    """
    m, k = a.shape
    n = weight.shape[0]
    int8 = a.dtype == torch.int8
    arch = architecture(a.device)
    kind = linear_kind(arch, int8)
    if kind == "decode":
        a, weight = a.view(torch.uint8), weight.view(torch.uint8)
    tile = tile_of(arch, kind)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    linear_kernel[grid](
        a,
        a_scale,
        weight,
        weight_scale,
        out if bias is None else bias,
        out if gate is None else gate,
        out,
        m,
        n,
        k,
        a.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        GELU=gelu,
        HAS_GATE=gate is not None,
        ACCUMULATE=accumulate,
        INT8=int8,
        DECODE=kind == "decode",
        EVEN_K=k % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=8,
        PARTS=tile.parts,
        SCALAR=scalar_products(arch),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
