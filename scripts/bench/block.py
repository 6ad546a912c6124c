"""One DiT block through lowvram beside diffusers' block: time, peak memory and error against fp32,
on random data with outlier channels.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from lowvram_kernels.tuning import pv_dtype, values_of
from lowvram_quantize.fp8 import quantize_fp8
from lowvram_quantize.int8 import quantize_int8
from lowvram_quantize.rows import RowEngine
from torch import Tensor

from lowvram.checkpoint.names import official_from_diffusers_dit
from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.memory.arena import Arena, Ledger
from lowvram.models.wan import WanTransformer
from lowvram.planner.phases import PlanChoice
from lowvram.planner.workspace import dit_workspace
from lowvram.request import LatentShape, Workload
from lowvram.store.layout import StoredTensor, component_layout
from lowvram.streaming.block import BlockView
from lowvram.variants import ModelConfig
from scripts.bench.timing import machine, measure

CHUNK_TOKENS = 8192
UNLIMITED = 2**62


@dataclass(frozen=True)
class BlockResult:
    """A block in one format. peak_gb: its weights and everything that the call allocates, its input
    as it takes it included.

    `cosine` and `update_cosine` are of its output, and of what it adds to its input, against fp32.
    """

    provider: str
    tokens: int
    median_ms: float
    peak_gb: float
    cosine: float
    update_cosine: float
    relative_rmse: float
    gpu: str
    torch: str
    commit: str


@dataclass(frozen=True)
class Inputs:
    """x: [M, D] fp32 residual stream; context: [text_len, D]; modulation: [6, D]; rotary: what
    diffusers' block takes.
    """

    x: Tensor
    context: Tensor
    modulation: Tensor
    rotary: tuple[Tensor, Tensor]
    latents: LatentShape


def make_block(config: ModelConfig, device: str) -> WanTransformerBlock:
    """diffusers' block with random weights in fp32."""
    dit = config.dit
    torch.manual_seed(0)
    block = WanTransformerBlock(
        dit.dim, dit.ffn_dim, dit.num_heads, "rms_norm_across_heads", True, dit.eps
    ).eval()
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    return block.to(device)


def make_inputs(config: ModelConfig, grid: tuple[int, int, int], device: str) -> Inputs:
    """One channel in 128 of the stream is 20 times as large as the others; of the text, 10
    times.
    """
    dit, (frames, rows, columns) = config.dit, grid
    generator = torch.Generator().manual_seed(1)
    tokens = frames * rows * columns
    x, context = (
        torch.randn(count, dit.dim, generator=generator) for count in (tokens, dit.text_len)
    )
    x[:, ::128] *= 20
    context[:, ::128] *= 10
    modulation = torch.randn(6, dit.dim, generator=generator) * 0.5
    latents = LatentShape(dit.in_dim, frames, rows * 2, columns * 2, grid)
    rotary = WanRotaryPosEmbed(dit.head_dim, dit.patch_size, 1024)(
        torch.empty(1, 1, frames, rows * 2, columns * 2)
    )
    cos, sin = (part.to(device) for part in rotary)
    return Inputs(x.to(device), context.to(device), modulation.to(device), (cos, sin), latents)


def stored_block(
    block: WanTransformerBlock, config: ModelConfig, format: str, device: str
) -> BlockView:
    """The block as it lies in a store of `format`, quantized by the quantizer."""
    weights = {
        official_from_diffusers_dit(f"blocks.0.{name}"): tensor
        for name, tensor in block.state_dict().items()
    }
    data, tensors = [], {}
    offset = 0
    with RowEngine(device=device) as engine:
        codes: dict[str, tuple[Tensor, Tensor]] = {}
        for stored in component_layout("high_noise", config, format).blocks[0]:
            tensor = _stored(stored, weights, codes, format, engine).contiguous().to(device)
            tensors[stored.name.removeprefix("blocks.0.")] = (
                TORCH_DTYPES[stored.dtype],
                stored.shape,
                offset,
            )
            data.append(tensor.flatten().view(torch.uint8))
            offset += tensor.nbytes
    return BlockView(torch.cat(data), tensors)


def _stored(
    stored: StoredTensor,
    weights: dict[str | None, Tensor],
    codes: dict[str, tuple[Tensor, Tensor]],
    format: str,
    engine: RowEngine,
) -> Tensor:
    if stored.role == "marker":
        return torch.zeros(stored.shape, dtype=torch.uint8)
    if stored.role == "copy":
        return weights[stored.source].reshape(stored.shape).to(TORCH_DTYPES[stored.dtype])
    if stored.source not in codes:
        weight = (
            weights[stored.source].cpu() if engine.device.type == "cpu" else weights[stored.source]
        )
        made = (
            quantize_fp8(weight, engine)
            if format == "fp8"
            else quantize_int8(weight, engine, rotated=format == "int8")
        )
        codes[stored.source] = made[:2]
    return codes[stored.source][0 if stored.role == "weight" else 1]


def diffusers_block(
    block: WanTransformerBlock, inputs: Inputs, dtype: torch.dtype
) -> Callable[[], Tensor]:
    block = block.to(dtype)
    x, context = inputs.x.to(dtype)[None], inputs.context.to(dtype)[None]
    time = inputs.modulation[None]
    return lambda: block(x, context, time, inputs.rotary)[0]


def lowvram_block(
    view: BlockView, config: ModelConfig, format: str, inputs: Inputs
) -> Callable[[], Tensor]:
    device, tokens = inputs.x.device, inputs.latents.num_tokens
    choice = PlanChoice(min(CHUNK_TOKENS, tokens), 1, 0, 0, False)
    frames, rows, columns = inputs.latents.grid
    vae = config.vae
    cell = vae.spatial_stride * config.dit.patch_size[1]
    clip = (columns * cell, rows * cell), (frames - 1) * vae.temporal_stride + 1
    workload = Workload.of(config, format, *clip)
    values = values_of(pv_dtype(torch.device(device)))
    workspace = dit_workspace(config.dit, workload.format, tokens, choice.chunk_tokens, 1, values)
    arena = Arena(workspace, Ledger("VRAM", UNLIMITED), device)
    model = WanTransformer(workload, choice, arena, device)
    modulation, context = (
        view["modulation"][0] + inputs.modulation,
        inputs.context.to(torch.bfloat16),
    )

    def run() -> Tensor:
        x = inputs.x.clone()
        # one block is no public operation of the model
        model._run_block(view, x, modulation, context)
        return x

    return run


def results(
    config: ModelConfig,
    grid: tuple[int, int, int],
    formats: tuple[str, ...],
    device: str,
    pvs: tuple[str, ...] = ("int8",),
) -> Iterator[BlockResult]:
    """diffusers' block in bf16, then lowvram's in each format, and in the first one with each other
    product of attention in `pvs`.
    """
    config = replace(config, dit=replace(config.dit, num_layers=1))
    inputs = make_inputs(config, grid, device)
    with torch.no_grad():
        block = make_block(config, device)
        views = {format: stored_block(block, config, format, device) for format in formats}
        exact = diffusers_block(block, inputs, torch.float32)().float()
        block = block.to(torch.bfloat16)
        weights = sum(parameter.nbytes for parameter in block.parameters())
        yield _result(
            "diffusers bf16",
            partial(diffusers_block, block, inputs, torch.bfloat16),
            inputs,
            exact,
            weights,
        )
        del block
        rows = [(format, "int8") for format in formats] + [
            (formats[0], pv) for pv in pvs if pv != "int8"
        ]
        for format, pv in rows:
            name = f"lowvram {format}" if pv == "int8" else f"lowvram {format}, PV {pv}"
            weights = component_layout("high_noise", config, format).block_bytes
            with mock.patch.dict(os.environ, {"LOWVRAM_PV": pv}):
                yield _result(
                    name,
                    partial(lowvram_block, views[format], config, format, inputs),
                    inputs,
                    exact,
                    weights,
                )


def _result(
    name: str,
    prepare: Callable[[], Callable[[], Tensor]],
    inputs: Inputs,
    exact: Tensor,
    weight_bytes: int,
) -> BlockResult:
    cuda = exact.is_cuda
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run = prepare()
    out = run().float()
    peak = (torch.cuda.max_memory_allocated() - before + weight_bytes) / 1e9 if cuda else 0.0
    median = measure(lambda _: run(), repeats=5, device="cuda")[1] if cuda else 0.0
    return BlockResult(
        name,
        inputs.latents.num_tokens,
        median,
        peak,
        _cosine(out, exact),
        _cosine(out - inputs.x, exact - inputs.x),
        float((out - exact).norm() / exact.norm()),
        *machine(),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
    )
