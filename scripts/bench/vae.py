"""Measures what tiles cost a picture: the demo's VAE decodes a drawn clip tiled and in one piece,
and seams are looked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from lowvram.checkpoint.layouts.infer import infer_vae
from lowvram.checkpoint.names import diffusers_vae_from_official
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.demo.run import MODEL
from lowvram.demo.scenes import render_collage
from lowvram.models.vae import WanVAE, tile_starts
from lowvram.planner.vae import VAE_TILE_MARGIN_PIXELS, VAE_TILE_OVERLAP_PIXELS, VAE_TILE_PIXELS

# Two tiles each way that overlap by exactly the 64 pixels which the decoder fades over.
SIZE = 2 * VAE_TILE_PIXELS - VAE_TILE_OVERLAP_PIXELS
FRAMES = 5
LEVELS = 127.5
WEIGHTS = MODEL / "Wan2.1_VAE.safetensors"


@torch.no_grad()
def encode(file: TensorFile, clip: Tensor) -> Tensor:
    """clip: [3, F, H, W] in -1..1 -> normalised latents [C, T, h, w], by diffusers' encoder with
    the same weights.
    """
    config = infer_vae(file.header.tensors)
    model = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        attn_scales=[],
        temperal_downsample=list(config.temporal_downsample),
    ).eval()
    model.load_state_dict(
        {
            diffusers_vae_from_official(name, config): file.read(name).float()
            for name in file.header.tensors
        }
    )
    latents = model.encode(clip[None]).latent_dist.mode()[0]
    mean, std = (
        torch.tensor(getattr(model.config, name)).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    normalised: Tensor = (latents - mean) / std
    return normalised


def decode(file: TensorFile, latents: Tensor, tile_pixels: int) -> Tensor:
    """[3, F, H, W] in -1..1, as a run decodes it."""
    vae = WanVAE(
        infer_vae(file.header.tensors),
        file.header.tensors,
        lambda name: file.read(name).float(),
        torch.device("cpu"),
    )
    clip = torch.empty(3, FRAMES, latents.shape[2] * 8, latents.shape[3] * 8)
    for first, top, pixels in vae.decode(latents, tile_pixels):
        clip[:, first : first + pixels.shape[1], top : top + pixels.shape[2]] = pixels
    return clip


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels over the range -1..1."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def steps(clip: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring columns and of neighbouring rows: number i is between i and i +
    1.
    """
    return clip.diff(dim=-1), clip.diff(dim=-2)


def seams(tiled: Tensor, whole: Tensor) -> dict[str, float]:
    """How much steps from pixel to pixel differ between `tiled` and `whole`, mean per line, in
    levels of 0..255.

    At edges: the worst of the lines where a tile begins, ends, or starts to count; elsewhere: the
    worst of all others.
    """
    starts = [
        place * 8
        for place in tile_starts(
            SIZE // 8, VAE_TILE_PIXELS // 8, (VAE_TILE_PIXELS - VAE_TILE_OVERLAP_PIXELS) // 8
        )
    ]
    borders = [
        line for start in starts for line in (start, start + VAE_TILE_PIXELS) if 0 < line < SIZE
    ]
    edges = sorted(
        {
            line + side - 1
            for line in borders
            for side in (-VAE_TILE_MARGIN_PIXELS, 0, VAE_TILE_MARGIN_PIXELS)
        }
    )
    lines = []
    for (tiled_steps, whole_steps), other in zip(
        zip(steps(tiled), steps(whole), strict=True), (-2, -1), strict=True
    ):
        lines.append((tiled_steps - whole_steps).abs().mean(dim=(0, 1, other)) * LEVELS)
    at_edge = torch.zeros(SIZE - 1, dtype=torch.bool)
    at_edge[edges] = True
    return {
        "step_at_edges_of_tiles": round(max(float(line[at_edge].max()) for line in lines), 4),
        "step_elsewhere": round(max(float(line[~at_edge].max()) for line in lines), 4),
    }


def measure(seed: int = 0) -> dict[str, Any]:
    """The shipped tiling against the decode in one piece, and for comparison two tiles of which one
    simply covers the other.
    """
    clip = render_collage(torch.Generator().manual_seed(seed), 1, FRAMES, SIZE)[0].clamp(-1, 1)
    with TensorFile(WEIGHTS) as file:
        latents = encode(file, clip)
        whole, tiled = (decode(file, latents, tile) for tile in (0, VAE_TILE_PIXELS))
        right = decode(file, latents[..., -VAE_TILE_PIXELS // 8 :], 0)
    begin = SIZE - VAE_TILE_PIXELS
    covered = right[..., 0] - whole[..., begin - 1] - (whole[..., begin] - whole[..., begin - 1])
    difference = (tiled - whole).abs() * LEVELS
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[begin:VAE_TILE_PIXELS] = inside[:, begin:VAE_TILE_PIXELS] = True
    return {
        "seed": seed,
        "psnr_of_one_piece_against_the_drawing_db": round(psnr(whole, clip), 2),
        "psnr_of_tiles_against_the_drawing_db": round(psnr(tiled, clip), 2),
        "psnr_of_tiles_against_one_piece_db": round(psnr(tiled, whole), 2),
        "largest_difference_in_overlaps": round(float(difference[..., inside].max()), 3),
        "largest_difference_elsewhere": round(float(difference[..., ~inside].max()), 3),
        "mean_difference_in_overlaps": round(float(difference[..., inside].mean()), 4),
        "mean_difference_elsewhere": round(float(difference[..., ~inside].mean()), 4),
        **seams(tiled, whole),
        "step_where_one_tile_covers_the_other": round(float(covered.abs().mean()) * LEVELS, 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/vae_tiles.json"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    sizes = {
        "size": SIZE,
        "frames": FRAMES,
        "tile": VAE_TILE_PIXELS,
        "overlap": VAE_TILE_OVERLAP_PIXELS,
        "margin": VAE_TILE_MARGIN_PIXELS,
    }
    clips = [measure(seed) for seed in range(options.seeds)]
    found = (
        {"what": __doc__, "unit": "levels of 0..255 where nothing else is said"}
        | sizes
        | {"clips": clips}
    )
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))
    return 0
