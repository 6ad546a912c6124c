"""Arithmetic of a DiT block: quantized (int8, int8-plain, fp8) or plain (bf16, fp32).

`models.wan` contains the block itself, once for all formats. This module contains the differences:
the type of activations, linears and attention.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import lowvram_kernels.ops as ops
import torch
import torch.nn.functional as F
from lowvram_kernels.adaln_quantize import adaln
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.rms_rope_quantize import rms_rope
from lowvram_kernels.sizes import EXACT_VALUES, KEY_TILE, STORED_VALUES
from lowvram_kernels.tuning import PV_DTYPES, pv_dtype, values_of
from torch import Tensor

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.errors import UnsupportedError, UsageError
from lowvram.formats import FORMATS
from lowvram.memory.arena import Arena
from lowvram.planner.wan import PLAIN_ROWS
from lowvram.streaming.block import LinearWeights

ACTIVATIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Rows(NamedTuple):
    """Input of a linear: values [M, K], and scales [M, 1] float32 if quantized.

    With two codes a value: [2, M, K] and [2, M, 1]; the input is the sum of both.
    """

    values: Tensor
    scale: Tensor | None


class Heads(NamedTuple):
    """Queries or keys: values [H, M, head_dim], and scales [H, M] float32 if quantized."""

    values: Tensor
    scale: Tensor | None


class Rope(NamedTuple):
    """cos and sin of the angles of M tokens, each [M, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


class Numerics(Protocol):
    """Arithmetic of one format. Results are stored in the arena, in the region named by the caller.

    compute: dtype of activations between ops; smoothed: keys are quantized less their mean.
    largest: if a tensor, [] float, it becomes the largest |x| of the fp16 activations since then.
    Shapes: M tokens, D = H * head_dim channels.
    """

    compute: torch.dtype
    smoothed: bool
    largest: Tensor | None

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, region: str) -> Rows:
        """LN(x) * scale + shift as the input of a linear; x: [M, D] float32."""

    def rows(self, x: Tensor, region: str) -> Rows:
        """x as the input of a linear."""

    def text_rows(self, x: Tensor, region: str) -> Rows:
        """x, the context of the text, as the input of a linear."""

    def gelu(self, x: Tensor, region: str) -> Rows:
        """GELU_tanh(x) as the input of a linear."""

    def linear(self, rows: Rows, weights: LinearWeights, out: Tensor) -> None:
        """out = rows W^T + b."""

    def linear_add(
        self, rows: Rows, weights: LinearWeights, x: Tensor, gate: Tensor | None
    ) -> None:
        """x += gate * (rows W^T + b); x: [M, D] float32, the residual stream; no gate is 1."""

    def attention_memory(self, prefix: str, num_keys: int) -> AttentionMemory:
        """Buffers for `num_keys` keys and values, in regions whose names start with `prefix`."""

    def heads(
        self, x: Tensor, weight: Tensor, rope: Rope | None, smoothing: Tensor | None, out: Heads
    ) -> None:
        """out = RoPE(RMSNorm(x)) - smoothing, split into heads; x: [M, D]."""

    def queries(self, num_queries: int) -> Heads:
        """Buffers for the queries of one chunk."""

    def values(self, v: Tensor, memory: AttentionMemory, start: int) -> None:
        """Store v [M, D], the values of tokens start .. start + M."""

    def attend(self, queries: Heads, memory: AttentionMemory, out: Tensor) -> None:
        """out = softmax(q k^T / sqrt(head_dim)) v, [M, D]."""


class AttentionMemory(NamedTuple):
    """Keys [H, N, head_dim] and values of all N tokens, with scales if quantized.

    values: [H, N, head_dim]; quantized [H, head_dim, N padded to `KEY_TILE`] with value_scales
    [H, tiles, head_dim, 2] float32 (see `quantize_values`), or [N, D] bfloat16 without.
    """

    keys: Heads
    values: Tensor
    value_scales: Tensor | None

    def key_rows(self, start: int, end: int) -> Heads:
        """Views of the keys of tokens start .. end."""
        scale = self.keys.scale
        return Heads(self.keys.values[:, start:end], None if scale is None else scale[:, start:end])


class _Shapes(NamedTuple):
    num_heads: int
    head_dim: int
    eps: float


def mean_key(x: Tensor, weight: Tensor, rope: Rope | None, num_heads: int, eps: float) -> Tensor:
    """Mean of the keys RoPE(RMSNorm(x)) over the tokens, [H, head_dim] float32, for smoothing."""
    cos, sin = rope or (None, None)
    return rms_rope(x, weight, cos, sin, num_heads=num_heads, eps=eps).mean(dim=1)


def activation_dtype() -> torch.dtype:
    """Dtype of a quantized format's activations between ops: `LOWVRAM_ACTIVATIONS`, default fp16.

    Values above 65504 are clamped in fp16; bf16 has no such limit, but keeps 8 bits instead of 11.
    Raises `UsageError` for another name.
    """
    name = os.environ.get("LOWVRAM_ACTIVATIONS") or "fp16"
    if name not in ACTIVATIONS:
        raise UsageError(f"LOWVRAM_ACTIVATIONS={name}: use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def arithmetic(format: str, device: torch.device) -> str:
    """Name of the arithmetic of a format on a device: runs with other names have other bits.

    For quantized formats the dtypes of attention's values (`LOWVRAM_PV`), those of the text and of
    activations (`LOWVRAM_ACTIVATIONS`), else the format.
    """
    if not FORMATS[format].quantized:
        return format
    values, activations = (
        str(dtype).removeprefix("torch.") for dtype in (pv_dtype(device), activation_dtype())
    )
    return f"values {values}, of the text {EXACT_VALUES}, activations {activations}"


def stored_values(format: str, device: torch.device) -> str:
    """Key of `STORED_VALUES` of self attention's values; `int8` where a format does not store any.

    Raises `UsageError` for a `LOWVRAM_PV` that the device does not support.
    """
    if not FORMATS[format].quantized:
        return "int8"
    try:
        return values_of(pv_dtype(device))
    except UnsupportedOpError as error:
        raise UsageError(str(error)) from None


class QuantizedNumerics:
    """Quantized arithmetic, on the ops of `lowvram_kernels`.

    Linears are int8, with or without rotation, or e4m3. Queries and keys of attention are int8, its
    values have the dtype of `pv_dtype`, and those of the text are fp16. Activations have
    `activation_dtype` between ops and are fp32 inside them.

    Refined, inputs of linears are two int8 codes, which takes two products, and values are fp16.

    GELU is fused with the quantization of its result, not with the product (`quantized_linear` can
    do that, too): quantization is bound by memory, which hides GELU, and the product is not. Both
    compute row by row, so the results do not depend on the memory plan.
    """

    smoothed = True

    def __init__(
        self,
        format: str,
        num_heads: int,
        head_dim: int,
        eps: float,
        arena: Arena,
        *,
        refined: bool = False,
    ) -> None:
        """refined: for the last steps (`Request.refine_steps`)."""
        self.compute = activation_dtype()
        self._rotated = FORMATS[format].rotated
        self._code = TORCH_DTYPES[FORMATS[format].weights]
        self._refined = refined
        self._shapes = _Shapes(num_heads, head_dim, eps)
        self._arena = arena
        self.largest: Tensor | None = None

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, region: str) -> Rows:
        """LN(x) * scale + shift, quantized."""
        return self._quantized(
            x,
            region,
            self._refined,
            partial(ops.adaln_quantize, x, scale, shift, eps=self._shapes.eps),
        )

    def rows(self, x: Tensor, region: str) -> Rows:
        """x, quantized."""
        return self._quantized(x, region, self._refined, partial(ops.quantize_rows, x))

    def text_rows(self, x: Tensor, region: str) -> Rows:
        """x, quantized; to two int8 codes, because every token attends to the text."""
        two = self._code == torch.int8
        return self._quantized(x, region, two, partial(ops.quantize_rows, x))

    def gelu(self, x: Tensor, region: str) -> Rows:
        """GELU_tanh(x), quantized."""
        return self._quantized(
            x, region, self._refined, partial(ops.gelu_quantize, x), "hidden_scales"
        )

    def _quantized(
        self,
        x: Tensor,
        region: str,
        two_codes: bool,
        quantize: Callable[..., None],
        scales: str = "row_scales",
    ) -> Rows:
        """The result of `quantize(out, out_scale, rotated=…)`, in the arena."""
        count, (rows, width) = 2 if two_codes else 1, x.shape
        codes = self._arena.view(region, (count, rows, width), self._code)
        of_rows = f"{region.split('.')[0]}.{scales}"
        scale = self._arena.view(of_rows, (count, rows, 1), torch.float32)
        if two_codes:
            quantize(codes[0], scale[0], rotated=self._rotated, low=codes[1], low_scale=scale[1])
            return Rows(codes, scale)
        quantize(codes[0], scale[0], rotated=self._rotated)
        return Rows(codes[0], scale[0])

    def linear(self, rows: Rows, weights: LinearWeights, out: Tensor) -> None:
        """out = rows W^T + b; its range is recorded in `largest`, if that is not None."""
        for number, (codes, scale) in enumerate(_codes(rows)):
            ops.quantized_linear(
                codes,
                scale,
                weights.weight,
                _scale(weights.scale),
                None if number else weights.bias,
                out,
                accumulate=number > 0,
            )
        if self.largest is not None and out.dtype == torch.float16:
            low, high = torch.aminmax(out)
            self.largest = torch.maximum(self.largest, torch.maximum(-low, high))

    def linear_add(
        self, rows: Rows, weights: LinearWeights, x: Tensor, gate: Tensor | None
    ) -> None:
        """x += gate * (rows W^T + b)."""
        for number, (codes, scale) in enumerate(_codes(rows)):
            ops.quantized_linear(
                codes,
                scale,
                weights.weight,
                _scale(weights.scale),
                None if number else weights.bias,
                x,
                gate=gate,
                accumulate=True,
            )

    def attention_memory(self, prefix: str, num_keys: int) -> AttentionMemory:
        """Buffers for int8 keys and for values: `EXACT_VALUES` of the text and in refined steps."""
        heads, width, _ = self._shapes
        tiles = -(-num_keys // KEY_TILE)
        names = ("keys", "key_scales", "values", "value_scales")
        keys, key_scales, values, value_scales = (f"{prefix}{name}" for name in names)
        stored = self._arena.view(keys, (heads, num_keys, width), torch.int8)
        scales = self._arena.view(key_scales, (heads, tiles * KEY_TILE), torch.float32)
        at_keys = Heads(stored, scales[:, :num_keys])
        exact = prefix or self._refined
        dtype = PV_DTYPES[EXACT_VALUES] if exact else pv_dtype(stored.device)
        if not STORED_VALUES[values_of(dtype)].scaled:
            rows = self._arena.view(values, (num_keys, heads * width), dtype)
            return AttentionMemory(at_keys, rows, None)
        return AttentionMemory(
            at_keys,
            self._arena.view(values, (heads, width, tiles * KEY_TILE), dtype),
            self._arena.view(value_scales, (heads, tiles, width, 2), torch.float32),
        )

    def heads(
        self, x: Tensor, weight: Tensor, rope: Rope | None, smoothing: Tensor | None, out: Heads
    ) -> None:
        """out = RoPE(RMSNorm(x)) - smoothing, split into heads and quantized to int8."""
        cos, sin = rope or (None, None)
        ops.rms_rope_quantize(
            x, weight, cos, sin, smoothing, out.values, _scale(out.scale), eps=self._shapes.eps
        )

    def queries(self, num_queries: int) -> Heads:
        """Buffers for the int8 queries of one chunk and their scales."""
        heads, width, _ = self._shapes
        return Heads(
            self._arena.view("attend.queries", (heads, num_queries, width), torch.int8),
            self._arena.view("attend.query_scales", (heads, num_queries), torch.float32),
        )

    def values(self, v: Tensor, memory: AttentionMemory, start: int) -> None:
        """Store v, quantized where it has scales; `start` is then a multiple of `KEY_TILE`."""
        if memory.value_scales is None:
            memory.values[start : start + v.shape[0]].copy_(v)
            return
        if start % KEY_TILE:
            raise UnsupportedError(
                f"quantized values must start at a multiple of {KEY_TILE} keys, got {start}"
            )
        first, last = start // KEY_TILE, -(-(start + v.shape[0]) // KEY_TILE)
        columns = slice(first * KEY_TILE, last * KEY_TILE)
        ops.quantize_values(v, memory.values[:, :, columns], memory.value_scales[:, first:last])

    def attend(self, queries: Heads, memory: AttentionMemory, out: Tensor) -> None:
        """out = softmax(q k^T / sqrt(head_dim)) v, with quantized q, k and v."""
        q_scale, k_scale = _scale(queries.scale), _scale(memory.keys.scale)
        ops.attention_int8(
            queries.values,
            q_scale,
            memory.keys.values,
            k_scale,
            memory.values,
            memory.value_scales,
            out,
        )


class PlainNumerics:
    """Unquantized arithmetic, the reference for the quality of quantized formats.

    Linears and attention in one float dtype, norms and the residual stream in fp32.
    """

    smoothed = False

    def __init__(
        self, compute: torch.dtype, num_heads: int, head_dim: int, eps: float, arena: Arena
    ) -> None:
        self.compute = compute
        self.largest: Tensor | None = None
        self._shapes = _Shapes(num_heads, head_dim, eps)
        self._arena = arena

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, region: str) -> Rows:
        """LN(x) * scale + shift, in fp32, rounded to `compute`."""
        return self._store(x, region, lambda part: adaln(part, scale, shift, self._shapes.eps))

    def rows(self, x: Tensor, region: str) -> Rows:
        """x, cast to `compute`."""
        return self._store(x, region, lambda part: part)

    def text_rows(self, x: Tensor, region: str) -> Rows:
        """x, cast to `compute`."""
        return self.rows(x, region)

    def gelu(self, x: Tensor, region: str) -> Rows:
        """GELU_tanh(x)."""
        return self._store(x, region, lambda part: F.gelu(part, approximate="tanh"))

    def _store(self, x: Tensor, region: str, prepare: Callable[[Tensor], Tensor]) -> Rows:
        rows = self._arena.view(region, (x.shape[0], x.shape[1]), self.compute)
        for part in _parts(x.shape[0]):
            rows[part] = prepare(x[part])
        return Rows(rows, None)

    def linear(self, rows: Rows, weights: LinearWeights, out: Tensor) -> None:
        """out = rows W^T + b."""
        torch.addmm(self._bias(weights), rows.values, weights.weight.t(), out=out)

    def linear_add(
        self, rows: Rows, weights: LinearWeights, x: Tensor, gate: Tensor | None
    ) -> None:
        """x += gate * (rows W^T + b), added in fp32."""
        weight, bias = weights.weight, self._bias(weights)
        for part in _parts(x.shape[0]):
            y = F.linear(rows.values[part], weight, bias).float()
            x[part] += y if gate is None else y.mul_(gate)

    def _bias(self, weights: LinearWeights) -> Tensor:
        if weights.bias is None:
            raise UnsupportedError("a linear of a block has no bias: quantize the model again")
        return weights.bias.to(self.compute)

    def attention_memory(self, prefix: str, num_keys: int) -> AttentionMemory:
        """Buffers for keys and values in `compute`."""
        shape = (self._shapes.num_heads, num_keys, self._shapes.head_dim)
        keys, values = (
            self._arena.view(f"{prefix}{name}", shape, self.compute) for name in ("keys", "values")
        )
        return AttentionMemory(Heads(keys, None), values, None)

    def heads(
        self, x: Tensor, weight: Tensor, rope: Rope | None, smoothing: Tensor | None, out: Heads
    ) -> None:
        """out = RoPE(RMSNorm(x)), split into heads; keys are not smoothed."""
        cos, sin = rope or (None, None)
        for part in _parts(x.shape[0]):
            angles = (None, None) if cos is None or sin is None else (cos[part], sin[part])
            out.values[:, part] = rms_rope(
                x[part], weight, *angles, num_heads=self._shapes.num_heads, eps=self._shapes.eps
            )

    def queries(self, num_queries: int) -> Heads:
        """Buffers for the queries of one chunk, in `compute`."""
        shape = (self._shapes.num_heads, num_queries, self._shapes.head_dim)
        return Heads(self._arena.view("attend.queries", shape, self.compute), None)

    def values(self, v: Tensor, memory: AttentionMemory, start: int) -> None:
        """Store v, split into heads."""
        heads = v.view(v.shape[0], self._shapes.num_heads, -1).transpose(0, 1)
        memory.values[:, start : start + v.shape[0]].copy_(heads)

    def attend(self, queries: Heads, memory: AttentionMemory, out: Tensor) -> None:
        """out = softmax(q k^T / sqrt(head_dim)) v, by torch's scaled_dot_product_attention."""
        keys, values = memory.keys.values[None], memory.values[None]
        for part in _parts(out.shape[0]):
            mixed = F.scaled_dot_product_attention(queries.values[None, :, part], keys, values)[0]
            out[part].view(mixed.shape[1], mixed.shape[0], -1).copy_(mixed.transpose(0, 1))


def _parts(count: int) -> Iterator[slice]:
    """Slices of at most `PLAIN_ROWS` that cover 0 .. `count`."""
    for start in range(0, count, PLAIN_ROWS):
        yield slice(start, min(start + PLAIN_ROWS, count))


def _scale(scale: Tensor | None) -> Tensor:
    """Return the scale. Raises `UnsupportedError` when there is none."""
    if scale is None:
        raise UnsupportedError("a quantized tensor has no scales: quantize the model again")
    return scale


def _codes(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """Codes [M, K] and scales [M, 1] of the one or two terms of a quantized input."""
    scale = _scale(rows.scale)
    return list(zip(rows.values, scale, strict=True)) if scale.ndim == 3 else [(rows.values, scale)]


def make_numerics(
    format: str,
    num_heads: int,
    head_dim: int,
    eps: float,
    arena: Arena,
    refined: bool = False,
) -> Numerics:
    """The arithmetic of a format of `FORMATS`. refined: that of the last steps, int8 alone."""
    if FORMATS[format].quantized:
        return QuantizedNumerics(format, num_heads, head_dim, eps, arena, refined=refined)
    return PlainNumerics(TORCH_DTYPES[FORMATS[format].weights], num_heads, head_dim, eps, arena)
