"""The UMT5 encoder, block by block (spec section 3): weights as stored, activations in
`Format.outside`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.errors import CheckpointError
from lowvram.models.linear import dequantized
from lowvram.planner.umt5 import HEADS_AT_ONCE
from lowvram.streaming.block import Blocks, BlockView
from lowvram.variants import TextEncoderConfig


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """[length, length] int64: the bucket of key position minus query position, bidirectional."""
    half = num_buckets // 2
    exact = half // 2
    positions = torch.arange(length)
    delta = positions[None, :] - positions[:, None]
    distance = delta.abs()
    log_scale = (half - exact) / math.log(max_distance / exact)
    far = exact + ((distance.clamp(min=1).float() / exact).log() * log_scale).long()
    return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (delta > 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight in that dtype; x: [L,
    d].
    """
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight.to(
        x.dtype
    )


class TextEncoder:
    """Encodes prompts together, so that each block is streamed once for all of them."""

    def __init__(
        self, config: TextEncoderConfig, compute: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._compute = compute
        self._device = device

    def encode(
        self,
        prompts: Sequence[Sequence[int]],
        embed: Callable[[Sequence[int]], Tensor],
        final_norm: Tensor,
        streamer: Blocks,
        after_block: Callable[[int], None] = lambda done: None,
    ) -> list[Tensor]:
        """Token ids without padding -> features, one [L, d_model] per prompt; padding would change
        nothing (spec 3.3).

        embed: the rows [L, d_model] of the token embedding, 2 GB as a whole, that have these
        numbers; after_block: told how many are done. Raises `CheckpointError` for ids past its end.
        """
        known = self._config.vocab_size
        for ids in prompts:
            if max(ids) >= known:
                raise CheckpointError(
                    f"the tokenizer gives id {max(ids)}, the text encoder knows {known}: they do "
                    f"not belong together"
                )
        streams = [embed(ids).to(self._device, self._compute) for ids in prompts]
        buckets = [
            relative_buckets(len(ids), self._config.num_buckets, self._config.max_distance).to(
                self._device
            )
            for ids in prompts
        ]
        for index in range(self._config.num_layers):
            with streamer.block("text_encoder", index) as block:
                streams = [
                    self._run_block(block, x, bucket)
                    for x, bucket in zip(streams, buckets, strict=True)
                ]
            after_block(index + 1)
        return [rms_norm(x, final_norm.to(self._device), self._config.eps) for x in streams]

    def _linear(self, block: BlockView, name: str, x: Tensor) -> Tensor:
        weights = block.linear(name)
        return F.linear(x, dequantized(weights.weight, weights.scale, self._compute))

    def _run_block(self, block: BlockView, x: Tensor, buckets: Tensor) -> Tensor:
        x = x + self._attention(
            block, rms_norm(x, block["norm1.weight"], self._config.eps), buckets
        )
        u = rms_norm(x, block["norm2.weight"], self._config.eps)
        gate = F.gelu(self._linear(block, "ffn.gate.0", u), approximate="tanh")
        return x + self._linear(block, "ffn.fc2", self._linear(block, "ffn.fc1", u) * gate)

    def _attention(self, block: BlockView, u: Tensor, buckets: Tensor) -> Tensor:
        """softmax(q k^T + bias) v: no scaling by the width, a bias table per layer, softmax in
        fp32.
        """
        q, k, v = (
            self._linear(block, f"attn.{name}", u)
            .unflatten(1, (self._config.num_heads, -1))
            .transpose(0, 1)
            for name in "qkv"
        )
        table = block["pos_embedding.embedding.weight"].to(self._compute)
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads in (
            slice(start, start + HEADS_AT_ONCE)
            for start in range(0, self._config.num_heads, HEADS_AT_ONCE)
        ):
            scores = q[heads] @ k[heads].transpose(1, 2)
            scores += F.embedding(buckets, table[:, heads]).permute(2, 0, 1)  # [h, L, L]
            mixed[heads] = F.softmax(scores.float(), dim=-1).to(self._compute) @ v[heads]
        return self._linear(block, "attn.o", mixed.transpose(0, 1).flatten(1))
