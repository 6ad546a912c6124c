"""Forward of one expert, computed in chunks of tokens over streamed blocks (spec section 2, design
section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from lowvram_kernels.adaln_quantize import adaln
from torch import Tensor

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.formats import FORMATS
from lowvram.memory.arena import Arena
from lowvram.models.linear import fixed_rows_linear
from lowvram.models.numerics import AttentionMemory, Heads, Rope, make_numerics, mean_key
from lowvram.models.rope import RopeTable
from lowvram.planner.phases import PlanChoice
from lowvram.planner.workspace import SMOOTHING_TOKENS
from lowvram.request import Workload
from lowvram.streaming.block import Blocks, BlockView
from lowvram.variants import DiTConfig


class ReadTensor(Protocol):
    """Reads a tensor of an expert's file by its official name."""

    def __call__(self, name: str) -> Tensor:
        """The tensor in the dtype of its file."""


class Conditioning(NamedTuple):
    """Contribution of time and text to all steps of one expert, computed once before the loop.

    time: [S, D] float32 (the head's e); modulation: [S, 6, D] float32 (e0); contexts: one
    [text_len, D] per branch.
    """

    time: Tensor
    modulation: Tensor
    contexts: tuple[Tensor, ...]


class EmbeddingsAndHead(NamedTuple):
    """Tensors before and after the blocks. patch: [D, C * 4]; head: [4 * out_dim, D] float32;
    head_modulation: [2, D] float32.
    """

    patch_weight: Tensor
    patch_bias: Tensor
    head_weight: Tensor
    head_bias: Tensor
    head_modulation: Tensor


def compute_dtype(format: str) -> torch.dtype:
    """Dtype of the arithmetic outside the blocks: bf16 in `bf16`, fp32 in all other formats."""
    return TORCH_DTYPES[FORMATS[format].outside]


def timestep_features(timesteps: Tensor, freq_dim: int) -> Tensor:
    """Sinusoidal features [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / (freq_dim / 2)).
    timesteps: [S]; returns [S, freq_dim] float32, from fp64 angles.
    """
    half = freq_dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = timesteps.to(torch.float64).cpu()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def condition(
    read: ReadTensor,
    config: DiTConfig,
    format: str,
    timesteps: Tensor,
    features: Sequence[Tensor],
    device: torch.device,
) -> Conditioning:
    """Time and text embeddings of one expert. features: one [L, text_dim] per branch, padded here
    with zeros (spec 2.1).
    """

    def linear(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        if device.type == "cuda":
            # the next weight has another size: the one before is not to stay in torch's allocator
            # beside it
            torch.cuda.empty_cache()
        weight, bias = (read(f"{name}.{part}").to(device, dtype) for part in ("weight", "bias"))
        # Twice where there is one: libraries multiply a single row by another routine, whose sums
        # may follow the number of threads.
        rows = x if x.shape[0] > 1 else x.repeat(2, 1)
        return F.linear(rows, weight, bias)[: x.shape[0]]

    fp32, compute = torch.float32, compute_dtype(format)
    hidden = F.silu(
        linear(timestep_features(timesteps, config.freq_dim).to(device), "time_embedding.0", fp32)
    )
    time = linear(hidden, "time_embedding.2", fp32)
    modulation = linear(F.silu(time), "time_projection.1", fp32).unflatten(1, (6, config.dim))
    padded = [
        F.pad(rows.to(device, compute), (0, 0, 0, config.text_len - rows.shape[0]))
        for rows in features
    ]
    embedded = [
        F.gelu(linear(rows, "text_embedding.0", compute), approximate="tanh") for rows in padded
    ]
    contexts = tuple(linear(rows, "text_embedding.2", compute) for rows in embedded)
    return Conditioning(time, modulation, contexts)


def load_embeddings_and_head(
    read: ReadTensor, format: str, device: torch.device
) -> EmbeddingsAndHead:
    """Read an expert's patch embedding and head."""
    compute = compute_dtype(format)
    return EmbeddingsAndHead(
        read("patch_embedding.weight").flatten(1).to(device, compute),
        read("patch_embedding.bias").to(device, compute),
        read("head.head.weight").to(device, torch.float32),
        read("head.head.bias").to(device, torch.float32),
        read("head.modulation")[0].to(device, torch.float32),
    )


class WanTransformer:
    """Forward of either expert for one workload. Buffers that span tokens lie in the arena."""

    def __init__(
        self,
        workload: Workload,
        choice: PlanChoice,
        arena: Arena,
        device: torch.device,
    ) -> None:
        config, format, latents = workload.config.dit, workload.format, workload.latents
        self._config, self._latents = config, latents
        self._tokens = latents.num_tokens
        self._chunk = choice.chunk_tokens
        self._joint = choice.joint_guidance
        self._arena = arena
        self._device = device
        self._usual, self._refined = (
            make_numerics(
                format.name, config.num_heads, config.head_dim, config.eps, arena, refined
            )
            for refined in (False, workload.refine_steps > 0)
        )
        self._numerics = self._usual
        self._rope = RopeTable(latents.grid, config.head_dim, device)
        count = min(self._tokens, SMOOTHING_TOKENS)
        self._smoothing_tokens = torch.arange(count, device=device) * self._tokens // count

    def velocities(
        self,
        latents: Tensor,
        step: int,
        conditioning: Conditioning,
        ends: EmbeddingsAndHead,
        streamer: Blocks,
        expert: str,
        after_block: Callable[[int, Tensor], None] | None = None,
        *,
        refined: bool = False,
        watched: bool = False,
    ) -> list[Tensor]:
        """Velocity of every branch, each [C, T, h, w] float32. after_block: called as
        `after_block(index, residual)` after each block; refined: in the arithmetic of the last
        steps (`Request.refine_steps`); watched: record the range of
        activations for `take_largest_activation`.

        Joint branches run together block by block, others one after the other; the result is the
        same bit for bit.
        """
        self._numerics = self._refined if refined else self._usual
        self._numerics.largest = latents.new_zeros((), dtype=torch.float16) if watched else None
        numbers = range(len(conditioning.contexts))
        groups = [tuple(numbers)] if self._joint else [(number,) for number in numbers]
        results: list[Tensor] = []
        for group in groups:
            streams = [self._embed(latents, slot, ends) for slot in range(len(group))]
            for index in range(self._config.num_layers):
                with streamer.block(expert, index) as block:
                    modulation = block["modulation"][0] + conditioning.modulation[step]
                    for x, branch in zip(streams, group, strict=True):
                        self._run_block(block, x, modulation, conditioning.contexts[branch])
                        if after_block is not None:
                            after_block(index, x)
            results += [self._head(x, conditioning.time[step], ends) for x in streams]
        return results

    def take_largest_activation(self) -> float:
        """Return and forget the largest |x| of a watched forward's fp16 activations; 0 where none
        is fp16.
        """
        largest, self._numerics.largest = self._numerics.largest, None
        return 0.0 if largest is None else float(largest)

    def _embed(self, latents: Tensor, slot: int, ends: EmbeddingsAndHead) -> Tensor:
        """Patches (c, dy, dx) -> tokens: the fp32 residual stream [N, D]."""
        x = self._arena.view(f"residual.{slot}", (self._tokens, self._config.dim), torch.float32)
        frames, rows, columns = self._latents.grid
        pt, ph, pw = self._config.patch_size
        patches = (
            latents.reshape(-1, frames, pt, rows, ph, columns, pw)
            .permute(1, 3, 5, 0, 2, 4, 6)
            .reshape(self._tokens, -1)
        )
        fixed_rows_linear(
            patches,
            ends.patch_weight,
            ends.patch_bias,
            x,
            lambda part: part.to(ends.patch_weight.dtype),
        )
        return x

    def _head(self, x: Tensor, time: Tensor, ends: EmbeddingsAndHead) -> Tensor:
        """The head and its unpatching: per-token values are ordered (pt, dy, dx, c), channel
        fastest.
        """
        shift, scale = ends.head_modulation + time
        out = x.new_empty(self._tokens, ends.head_weight.shape[0])
        fixed_rows_linear(
            x,
            ends.head_weight,
            ends.head_bias,
            out,
            lambda part: adaln(part, scale + 1, shift, self._config.eps),
        )
        frames, rows, columns = self._latents.grid
        pt, ph, pw = self._config.patch_size
        cells = out.view(frames, rows, columns, pt, ph, pw, -1).permute(6, 0, 3, 1, 4, 2, 5)
        return cells.reshape(self._latents.shape)

    def _run_block(self, block: BlockView, x: Tensor, modulation: Tensor, context: Tensor) -> None:
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation
        memory = self._self_keys(block, x, scale_sa + 1, shift_sa)
        self._attend(block, x, "self_attn", scale_sa + 1, shift_sa, gate_sa, memory, rotary=True)
        memory = self._text_keys(block, context)
        self._attend(
            block,
            x,
            "cross_attn",
            block["norm3.weight"],
            block["norm3.bias"],
            None,
            memory,
            rotary=False,
        )
        self._feed_forward(block, x, scale_ff + 1, shift_ff, gate_ff)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._tokens, self._chunk):
            yield start, min(start + self._chunk, self._tokens)

    def _rope_of(self, start: int, end: int) -> Rope:
        return Rope(*self._rope.at(torch.arange(start, end, device=self._device)))

    def _buffer(self, region: str, rows: int, columns: int) -> Tensor:
        return self._arena.view(region, (rows, columns), self._numerics.compute)

    def _self_keys(
        self, block: BlockView, x: Tensor, scale: Tensor, shift: Tensor
    ) -> AttentionMemory:
        """K and V of all tokens, chunk by chunk."""
        num, dim, weight = self._numerics, self._config.dim, block["self_attn.norm_k.weight"]
        memory = num.attention_memory("", self._tokens)
        smoothing = None
        if num.smoothed:
            tokens = self._smoothing_tokens
            key = self._buffer("project.projected", len(tokens), dim)
            num.linear(
                num.modulated(x[tokens], scale, shift, "project.rows"),
                block.linear("self_attn.k"),
                key,
            )
            smoothing = mean_key(
                key, weight, Rope(*self._rope.at(tokens)), self._config.num_heads, self._config.eps
            )
        for start, end in self._chunks():
            projected = self._buffer("project.projected", end - start, 2 * dim)
            rows = num.modulated(x[start:end], scale, shift, "project.rows")
            num.linear(rows, block.linear("self_attn.k", "self_attn.v"), projected)
            num.heads(
                projected[:, :dim],
                weight,
                self._rope_of(start, end),
                smoothing,
                memory.key_rows(start, end),
            )
            num.values(projected[:, dim:], memory, start)
        return memory

    def _text_keys(self, block: BlockView, context: Tensor) -> AttentionMemory:
        """K and V of the text; recomputed at every visit, because keeping them costs more memory
        than they cost time.
        """
        num, dim, weight = self._numerics, self._config.dim, block["cross_attn.norm_k.weight"]
        length = context.shape[0]
        memory = num.attention_memory("text_", length)
        projected = self._buffer("project.projected", length, 2 * dim)
        num.linear(
            num.text_rows(context, "project.rows"),
            block.linear("cross_attn.k", "cross_attn.v"),
            projected,
        )
        key = projected[:, :dim]
        smoothing = (
            mean_key(key, weight, None, self._config.num_heads, self._config.eps)
            if num.smoothed
            else None
        )
        num.heads(key, weight, None, smoothing, memory.key_rows(0, length))
        num.values(projected[:, dim:], memory, 0)
        return memory

    def _attend(
        self,
        block: BlockView,
        x: Tensor,
        name: str,
        scale: Tensor,
        shift: Tensor,
        gate: Tensor | None,
        memory: AttentionMemory,
        rotary: bool,
    ) -> None:
        """x += gate * o(attention(q(LN(x) * scale + shift), memory)), chunk by chunk."""
        num, dim, weight = self._numerics, self._config.dim, block[f"{name}.norm_q.weight"]
        for start, end in self._chunks():
            query = self._buffer("attend.projected", end - start, dim)
            num.linear(
                num.modulated(x[start:end], scale, shift, "attend.rows"),
                block.linear(f"{name}.q"),
                query,
            )
            queries: Heads = num.queries(end - start)
            num.heads(query, weight, self._rope_of(start, end) if rotary else None, None, queries)
            attended = self._buffer("attend.attended", end - start, dim)
            num.attend(queries, memory, attended)
            num.linear_add(
                num.rows(attended, "attend.rows"), block.linear(f"{name}.o"), x[start:end], gate
            )

    def _feed_forward(
        self, block: BlockView, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor
    ) -> None:
        """x += gate * ffn2(GELU(ffn0(LN(x) * scale + shift))), chunk by chunk."""
        num = self._numerics
        for start, end in self._chunks():
            hidden = self._buffer("ffn.hidden", end - start, self._config.ffn_dim)
            num.linear(
                num.modulated(x[start:end], scale, shift, "ffn.rows"), block.linear("ffn.0"), hidden
            )
            num.linear_add(
                num.gelu(hidden, "ffn.hidden_rows"), block.linear("ffn.2"), x[start:end], gate
            )
