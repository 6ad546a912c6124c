"""How a block computes: quantized (int8, int8-plain, fp8) or plain (bf16, fp32), behind one
interface.

A block is written once, in `models.wan`; what differs between formats is here: what an activation
is, how a linear multiplies it and how attention reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import lowvram_kernels.ops as ops
import torch
import torch.nn.functional as F
from lowvram_kernels.adaln_quantize import adaln
from lowvram_kernels.rms_rope_quantize import rms_rope
from lowvram_kernels.sizes import KEY_TILE
from lowvram_kernels.tuning import pv_dtype
from torch import Tensor

from lowvram.checkpoint.readers.safetensors import TORCH_DTYPES
from lowvram.errors import UnsupportedError
from lowvram.formats import FORMATS
from lowvram.memory.arena import Arena
from lowvram.planner.wan import PLAIN_ROWS
from lowvram.streaming.block import LinearWeights


class Rows(NamedTuple):
    """The input of a linear: [M, K] values, and [M, 1] float32 scales where they are quantized."""

    values: Tensor
    scale: Tensor | None


class Heads(NamedTuple):
    """Queries or keys: [H, M, head_dim], and [H, M] float32 scales where they are quantized."""

    values: Tensor
    scale: Tensor | None


class Rope(NamedTuple):
    """cos and sin of a token's angles, each [M, head_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


class Numerics(Protocol):
    """One format's arithmetic. Outputs lie in the arena regions that the caller names."""

    compute: torch.dtype

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, region: str) -> Rows:
        """LN(x) * scale + shift."""

    def rows(self, x: Tensor, region: str) -> Rows:
        """x as the input of a linear."""

    def gelu(self, x: Tensor, region: str) -> Rows:
        """GELU_tanh(x) as the input of a linear."""

    def linear(self, rows: Rows, weights: LinearWeights, out: Tensor) -> None:
        """out = rows W^T + b."""

    def linear_add(
        self, rows: Rows, weights: LinearWeights, x: Tensor, gate: Tensor | None
    ) -> None:
        """x += gate * (rows W^T + b), x the fp32 residual stream."""

    def attention_memory(self, prefix: str, num_keys: int) -> AttentionMemory:
        """Keys and values of `num_keys` tokens in the arena regions `prefix`keys,
        `prefix`values.
        """

    def heads(
        self, x: Tensor, weight: Tensor, rope: Rope | None, smoothing: Tensor | None, out: Heads
    ) -> None:
        """out = RoPE(RMSNorm(x)) - smoothing, split into heads."""

    def queries(self, num_queries: int) -> Heads:
        """Room for one chunk's queries."""

    def values(self, v: Tensor, memory: AttentionMemory, start: int) -> None:
        """Stores v, the values of tokens start .. start + M."""

    def attend(self, queries: Heads, memory: AttentionMemory, out: Tensor) -> None:
        """out = softmax(q k^T / sqrt(head_dim)) v, [M, D]."""


class AttentionMemory(NamedTuple):
    """Keys [H, N, head_dim] and values of all tokens, with their scales where they are
    quantized.
    """

    keys: Heads
    values: Tensor
    value_scales: Tensor | None

    def key_rows(self, start: int, end: int) -> Heads:
        scale = self.keys.scale
        return Heads(self.keys.values[:, start:end], None if scale is None else scale[:, start:end])


class _Shapes(NamedTuple):
    num_heads: int
    head_dim: int
    eps: float


def mean_key(x: Tensor, weight: Tensor, rope: Rope | None, num_heads: int, eps: float) -> Tensor:
    """The mean over tokens of RoPE(RMSNorm(x)), [H, head_dim] float32: what the keys are smoothed
    by.
    """
    cos, sin = rope or (None, None)
    return rms_rope(x, weight, cos, sin, num_heads=num_heads, eps=eps).mean(dim=1)


def attention_values(format: str, device: torch.device) -> str:
    """The dtype that attention multiplies values in: for quantized formats as `LOWVRAM_PV` says,
    else that of the weights.
    """
    return str(pv_dtype(device)).removeprefix("torch.") if FORMATS[format].quantized else format


class QuantizedNumerics:
    """int8 with or without rotation, or e4m3, for linears; int8 for attention, values as `pv_dtype`
    says; bf16 between ops, fp32 inside.

    GELU stays with the quantization of its rows although `quantized_linear` can apply it: that op
    is bound by memory, which hides GELU, and the product is not. Both places compute row by row, so
    neither ties a bit to the memory plan.
    """

    compute = torch.bfloat16

    def __init__(
        self, format: str, num_heads: int, head_dim: int, eps: float, arena: Arena
    ) -> None:
        self._rotated = FORMATS[format].rotated
        self._code = TORCH_DTYPES[FORMATS[format].weights]
        self._shapes = _Shapes(num_heads, head_dim, eps)
        self._arena = arena

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, region: str) -> Rows:
        rows = self._room(x, region)
        ops.adaln_quantize(
            x,
            scale,
            shift,
            rows.values,
            _scale(rows.scale),
            eps=self._shapes.eps,
            rotated=self._rotated,
        )
        return rows

    def rows(self, x: Tensor, region: str) -> Rows:
        rows = self._room(x, region)
        ops.quantize_rows(x, rows.values, _scale(rows.scale), rotated=self._rotated)
        return rows

    def gelu(self, x: Tensor, region: str) -> Rows:
        rows = self._room(x, region, "hidden_scales")
        ops.gelu_quantize(x, rows.values, _scale(rows.scale), rotated=self._rotated)
        return rows

    def _room(self, x: Tensor, region: str, scales: str = "row_scales") -> Rows:
        stage = region.split(".")[0]
        values = self._arena.view(region, (x.shape[0], x.shape[1]), self._code)
        return Rows(values, self._arena.view(f"{stage}.{scales}", (x.shape[0], 1), torch.float32))

    def linear(self, rows: Rows, weights: LinearWeights, out: Tensor) -> None:
        scales = _scale(rows.scale), _scale(weights.scale)
        ops.quantized_linear(rows.values, scales[0], weights.weight, scales[1], weights.bias, out)

    def linear_add(
        self, rows: Rows, weights: LinearWeights, x: Tensor, gate: Tensor | None
    ) -> None:
        scales = _scale(rows.scale), _scale(weights.scale)
        ops.quantized_linear(
            rows.values,
            scales[0],
            weights.weight,
            scales[1],
            weights.bias,
            x,
            gate=gate,
            accumulate=True,
        )

    def attention_memory(self, prefix: str, num_keys: int) -> AttentionMemory:
        heads, width, _ = self._shapes
        tiles = -(-num_keys // KEY_TILE)
        names = ("keys", "key_scales", "values", "value_scales")
        keys, key_scales, values, value_scales = (f"{prefix}{name}" for name in names)
        stored = self._arena.view(keys, (heads, num_keys, width), torch.int8)
        return AttentionMemory(
            Heads(stored, self._arena.view(key_scales, (heads, num_keys), torch.float32)),
            self._arena.view(values, (heads, width, tiles * KEY_TILE), pv_dtype(stored.device)),
            self._arena.view(value_scales, (heads, width, tiles), torch.float32),
        )

    def heads(
        self, x: Tensor, weight: Tensor, rope: Rope | None, smoothing: Tensor | None, out: Heads
    ) -> None:
        cos, sin = rope or (None, None)
        ops.rms_rope_quantize(
            x, weight, cos, sin, smoothing, out.values, _scale(out.scale), eps=self._shapes.eps
        )

    def queries(self, num_queries: int) -> Heads:
        heads, width, _ = self._shapes
        return Heads(
            self._arena.view("attend.queries", (heads, num_queries, width), torch.int8),
            self._arena.view("attend.query_scales", (heads, num_queries), torch.float32),
        )

    def values(self, v: Tensor, memory: AttentionMemory, start: int) -> None:
        if memory.value_scales is None or start % KEY_TILE:
            raise UnsupportedError(
                f"quantized values begin on a multiple of {KEY_TILE} keys, got {start}"
            )
        first, last = start // KEY_TILE, -(-(start + v.shape[0]) // KEY_TILE)
        columns = slice(first * KEY_TILE, last * KEY_TILE)
        ops.quantize_values(v, memory.values[:, :, columns], memory.value_scales[:, :, first:last])

    def attend(self, queries: Heads, memory: AttentionMemory, out: Tensor) -> None:
        scales = (_scale(part) for part in (queries.scale, memory.keys.scale, memory.value_scales))
        q_scale, k_scale, v_scale = scales
        ops.attention_int8(
            queries.values, q_scale, memory.keys.values, k_scale, memory.values, v_scale, out
        )


class PlainNumerics:
    """The unquantized yardstick: linears and attention in one float dtype, norms and the residual
    stream in fp32.
    """

    def __init__(
        self, compute: torch.dtype, num_heads: int, head_dim: int, eps: float, arena: Arena
    ) -> None:
        self.compute = compute
        self._shapes = _Shapes(num_heads, head_dim, eps)
        self._arena = arena

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, region: str) -> Rows:
        return self._store(x, region, lambda part: adaln(part, scale, shift, self._shapes.eps))

    def rows(self, x: Tensor, region: str) -> Rows:
        return self._store(x, region, lambda part: part)

    def gelu(self, x: Tensor, region: str) -> Rows:
        return self._store(x, region, lambda part: F.gelu(part, approximate="tanh"))

    def _store(self, x: Tensor, region: str, prepare: Callable[[Tensor], Tensor]) -> Rows:
        rows = self._arena.view(region, (x.shape[0], x.shape[1]), self.compute)
        for part in _parts(x.shape[0]):
            rows[part] = prepare(x[part])
        return Rows(rows, None)

    def linear(self, rows: Rows, weights: LinearWeights, out: Tensor) -> None:
        torch.addmm(self._bias(weights), rows.values, weights.weight.t(), out=out)

    def linear_add(
        self, rows: Rows, weights: LinearWeights, x: Tensor, gate: Tensor | None
    ) -> None:
        weight, bias = weights.weight, self._bias(weights)
        for part in _parts(x.shape[0]):
            y = F.linear(rows.values[part], weight, bias).float()
            x[part] += y if gate is None else y.mul_(gate)

    def _bias(self, weights: LinearWeights) -> Tensor:
        if weights.bias is None:
            raise UnsupportedError("a linear of a block has no bias: quantize the model again")
        return weights.bias.to(self.compute)

    def attention_memory(self, prefix: str, num_keys: int) -> AttentionMemory:
        shape = (self._shapes.num_heads, num_keys, self._shapes.head_dim)
        keys, values = (
            self._arena.view(f"{prefix}{name}", shape, self.compute) for name in ("keys", "values")
        )
        return AttentionMemory(Heads(keys, None), values, None)

    def heads(
        self, x: Tensor, weight: Tensor, rope: Rope | None, smoothing: Tensor | None, out: Heads
    ) -> None:
        cos, sin = rope or (None, None)
        for part in _parts(x.shape[0]):
            angles = (None, None) if cos is None or sin is None else (cos[part], sin[part])
            out.values[:, part] = rms_rope(
                x[part], weight, *angles, num_heads=self._shapes.num_heads, eps=self._shapes.eps
            )

    def queries(self, num_queries: int) -> Heads:
        shape = (self._shapes.num_heads, num_queries, self._shapes.head_dim)
        return Heads(self._arena.view("attend.queries", shape, self.compute), None)

    def values(self, v: Tensor, memory: AttentionMemory, start: int) -> None:
        heads = v.view(v.shape[0], self._shapes.num_heads, -1).transpose(0, 1)
        memory.values[:, start : start + v.shape[0]].copy_(heads)

    def attend(self, queries: Heads, memory: AttentionMemory, out: Tensor) -> None:
        keys, values = memory.keys.values[None], memory.values[None]
        for part in _parts(out.shape[0]):
            mixed = F.scaled_dot_product_attention(queries.values[None, :, part], keys, values)[0]
            out[part].view(mixed.shape[1], mixed.shape[0], -1).copy_(mixed.transpose(0, 1))


def _parts(count: int) -> Iterator[slice]:
    """0 .. `count` in slices of `PLAIN_ROWS`."""
    for start in range(0, count, PLAIN_ROWS):
        yield slice(start, min(start + PLAIN_ROWS, count))


def _scale(scale: Tensor | None) -> Tensor:
    """The scale of what is quantized."""
    if scale is None:
        raise UnsupportedError(
            "quantized arithmetic was given a tensor without scales: quantize the model again"
        )
    return scale


def make_numerics(format: str, num_heads: int, head_dim: int, eps: float, arena: Arena) -> Numerics:
    """The arithmetic of one of `FORMATS`."""
    if FORMATS[format].quantized:
        return QuantizedNumerics(format, num_heads, head_dim, eps, arena)
    return PlainNumerics(TORCH_DTYPES[FORMATS[format].weights], num_heads, head_dim, eps, arena)
