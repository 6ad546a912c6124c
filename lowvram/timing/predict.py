"""Predict the computing times of a plan from the rates of a machine. No torch."""

from __future__ import annotations

import math

from lowvram.checkpoint.names import vae_shapes
from lowvram.formats import Format
from lowvram.hardware.profile import MachineProfile
from lowvram.planner.vae import VAE_TILE_OVERLAP_PIXELS
from lowvram.request import Workload
from lowvram.variants import DiTConfig, TextEncoderConfig, VAEConfig

# Rows of a tile of GEMM and attention: a chunk is padded to a multiple of it.
TILE_ROWS = 128
# Kernel launches of a quantized block per chunk of tokens and per visit: the ops, and torch code
# between them, mostly for the angles of a chunk's tokens, twice. Another per visit multiplies each
# code of the text. A test counts them.
LAUNCHES_PER_CHUNK = 46
LAUNCHES_PER_VISIT = 46


def linear_ops(config: DiTConfig, rows: int) -> int:
    """Operations of a block's linears over `rows` tokens, without the text's keys and values."""
    return 2 * rows * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)


def text_ops(config: DiTConfig) -> int:
    """Operations of the linears for the text's keys and values, once per visit and branch."""
    return 4 * config.text_len * config.dim**2


def text_codes(format: Format) -> int:
    """Codes of the text's context in a format (`Numerics.text_rows`)."""
    return 2 if format.weights == "I8" else 1


def attention_ops(config: DiTConfig, queries: int, keys: int) -> int:
    """Operations of attention of `queries` tokens over `keys` tokens, all heads."""
    return 4 * queries * keys * config.dim


def block_seconds(
    config: DiTConfig,
    format: Format,
    num_tokens: int,
    chunk_tokens: int,
    profile: MachineProfile,
    refined: bool = False,
) -> float | None:
    """Seconds to compute one block for one branch; None if the profile has no rate for the format.
    refined: in a refined step (`Request.refine_steps`).

    Per chunk, each linear is bound by its operations or by its memory traffic, attention by its
    operations, and the fused element-wise kernels by their memory traffic. On a GPU, launches
    overlap with this and are the bound only for small chunks.
    """
    gemm = profile.gemm_ops_s(format.name)
    # int8 keys with fp16 values are faster than bf16, by how much was not measured
    attend = profile.attention_rate("bf16" if refined else format.name)
    if gemm is None or attend is None:
        return None
    codes = 2 if refined else 1
    whole, rest = divmod(num_tokens, chunk_tokens)
    chunks = whole + (rest > 0)
    seconds = sum(
        count
        * _chunk_seconds(
            config,
            format,
            rows,
            num_tokens,
            gemm,
            attend,
            profile.elementwise_bytes_s,
            codes,
        )
        for count, rows in ((whole, chunk_tokens), (1, rest))
        if rows
    )
    seconds += text_codes(format) * text_ops(config) / gemm
    launches = chunks * LAUNCHES_PER_CHUNK + LAUNCHES_PER_VISIT + text_codes(format)
    launching = launches * profile.launch_s
    return max(seconds, launching) if profile.device == "cuda" else seconds + launching


def _chunk_seconds(
    config: DiTConfig,
    format: Format,
    rows: int,
    keys: int,
    gemm: float,
    attend: float,
    bandwidth: float,
    codes: int,
) -> float:
    """Seconds of one chunk. codes: of each input of a linear, as many as its products."""
    compute, code = format.float_bytes, format.code_bytes
    dim, ffn = config.dim, config.ffn_dim
    padded = math.ceil(rows / TILE_ROWS) * TILE_ROWS
    added = 8 * dim  # x, fp32, read and written
    # (inputs, outputs, bytes written per row): k and v together; q and o of both attentions; both
    # linears of the feed-forward
    linears = (
        (dim, 2 * dim, 2 * dim * compute),
        *((dim, dim, dim * compute), (dim, dim, added)) * 2,
        (dim, ffn, ffn * compute),
        (ffn, dim, added),
    )
    seconds = codes * sum(
        max(
            2 * padded * inputs * outputs / gemm,
            (inputs * outputs * code + rows * (inputs * code + written)) / bandwidth,
        )
        for inputs, outputs, written in linears
    )
    seconds += attention_ops(config, padded, keys + config.text_len) / attend
    return seconds + rows * elementwise_bytes(config, format, codes) / bandwidth


def elementwise_bytes(config: DiTConfig, format: Format, codes: int = 1) -> int:
    """Bytes that a block's fused element-wise kernels read and write per token.

    Four LayerNorms (fp32 in, codes out), RMSNorm and RoPE of q and k (counted twice each), v, the
    inputs of both o, and GELU. codes: of each input of a linear.
    """
    compute, code = format.float_bytes, codes * format.code_bytes
    norms = 4 * config.dim * (4 + code)
    heads = 4 * config.dim * (compute + code)
    rows = 2 * config.dim * (compute + code)
    return norms + heads + rows + config.ffn_dim * (compute + code)


def text_seconds(
    config: TextEncoderConfig,
    format: Format,
    tokens: int,
    block_parameters: int,
    profile: MachineProfile,
) -> float:
    """Seconds to compute one block of the text encoder for `tokens` tokens.

    The weights are dequantized, then multiplied in `Format.outside`: fp32 at half of bf16's rate,
    as on consumer cards.
    """
    rate = profile.gemm_bf16_ops_s / (2 if format.outside == "F32" else 1)
    attention = 4 * tokens * tokens * config.num_heads * config.head_dim
    return (
        2 * tokens * block_parameters + attention
    ) / rate + 3 * block_parameters / profile.elementwise_bytes_s


def decode_ops(config: VAEConfig) -> float:
    """Operations of the VAE's decoder per output pixel and frame (spec 4.2).

    Counts each convolution at the resolution of its level.
    """
    up = tuple(reversed(config.temporal_downsample))
    per_level = config.num_res_blocks + 2  # the residual blocks, then the resampler

    def share(level: int) -> float:
        """Positions of a level per output pixel and frame."""
        return 0.25 ** (len(up) - level) * 0.5 ** sum(up[level:])

    total = 0.0
    for name, shape in vae_shapes(config).items():
        if (
            not name.startswith(("decoder.", "conv2."))
            or not name.endswith(".weight")
            or len(shape) < 4
        ):
            continue
        parts = name.split(".")
        level = len(up) if parts[1] == "head" else 0
        if parts[1] == "upsamples":
            level, number = divmod(int(parts[2]), per_level)
            # the spatial convolution of a resampler runs at the upsampled resolution
            level += number == per_level - 1 and "time_conv" not in parts
        total += 2 * math.prod(shape) * share(level)
    return total


def decode_seconds(workload: Workload, tile_pixels: int, profile: MachineProfile) -> float:
    """Seconds to decode the clip in overlapping tiles and to copy it to the host as fp32."""
    vae, latents = workload.config.vae, workload.latents
    height, width = latents.height * vae.spatial_stride, latents.width * vae.spatial_stride
    frames = (latents.frames - 1) * vae.temporal_stride + 1
    pixels = frames * _tiled(height, tile_pixels) * _tiled(width, tile_pixels)
    return pixels * (decode_ops(vae) / profile.conv_ops_s + 3 * 4 / profile.link_bytes_s)


def _tiled(length: int, tile: int) -> int:
    """Pixels that tiles of `tile` pixels decode along one side, with overlaps; 0: no tiling."""
    if not tile or length <= tile:
        return length
    return (math.ceil((length - tile) / (tile - VAE_TILE_OVERLAP_PIXELS)) + 1) * tile
