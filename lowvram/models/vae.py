"""Latents to frames through diffusers' AutoencoderKLWan, in tiles whose size follows from the video's size alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowvram.checkpoint.names import diffusers_vae_from_official
from lowvram.config import VAEConfig
from lowvram.errors import CheckpointError
from lowvram.memory.phases import VAE_TILE_OVERLAP_PIXELS


class WanVAE:
    """The decoder of one store. `read(name)` gives a tensor by its official name; only the decoder goes to the device."""

    def __init__(self, config: VAEConfig, tensors: Mapping[str, object], read: Callable[[str], Tensor], device: torch.device) -> None:
        self._config = config
        self._device = device
        self._model = _build(config)
        state = {}
        for name in tensors:
            target = diffusers_vae_from_official(name, config)
            if target is None:
                raise CheckpointError(f"the VAE holds {name}, which no Wan VAE has: quantize the model again")
            state[target] = read(name)
        self._model.load_state_dict(state, assign=True)
        self._model.decoder.to(device)
        self._model.post_quant_conv.to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor, tile_pixels: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
        """latents: [C, T, h, w] float32, normalised -> [3, F, H, W] float32 on the host, in -1..1. tile_pixels: 0 for no tiling."""
        mean, std = (
            torch.tensor(getattr(self._model.config, name), device=latents.device).view(-1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        latents = latents * std + mean
        if not tile_pixels:
            progress(0, 1)
            clip = self._decode_tile(latents)
            progress(1, 1)
            return clip
        return self._decode_tiles(latents, tile_pixels, progress)

    def _decode_tile(self, latents: Tensor) -> Tensor:
        clip: Tensor = self._model.decode(latents.unsqueeze(0).to(self._device), return_dict=False)[0][0]
        return clip.float().clamp(-1, 1).cpu()

    def _decode_tiles(self, latents: Tensor, tile_pixels: int, progress: Callable[[int, int], None]) -> Tensor:
        """Tiles overlap and fade into one another linearly; the weights of all tiles over a pixel are divided out."""
        stride = self._config.spatial_stride
        tile, step = tile_pixels // stride, (tile_pixels - VAE_TILE_OVERLAP_PIXELS) // stride
        _, frames, height, width = latents.shape
        places = [(top, left) for top in tile_starts(height, tile, step) for left in tile_starts(width, tile, step)]
        clip = torch.zeros(3, (frames - 1) * self._config.temporal_stride + 1, height * stride, width * stride)
        total = torch.zeros(height * stride, width * stride)
        for number, (top, left) in enumerate(places):
            progress(number, len(places))
            part = self._decode_tile(latents[:, :, top : top + tile, left : left + tile])
            rows, columns = part.shape[-2:]
            weight = _fade(rows, VAE_TILE_OVERLAP_PIXELS)[:, None] * _fade(columns, VAE_TILE_OVERLAP_PIXELS)[None]
            area = (slice(top * stride, top * stride + rows), slice(left * stride, left * stride + columns))
            clip[:, :, area[0], area[1]] += part.mul_(weight)
            total[area] += weight
        progress(len(places), len(places))
        return clip.div_(total)


def tile_starts(length: int, tile: int, step: int) -> list[int]:
    """Starts of tiles that cover 0 .. length, all of them whole wherever `length` allows."""
    last = max(0, length - tile)
    return [*range(0, last, step), last]


def _fade(length: int, overlap: int) -> Tensor:
    """[length] weights that rise over `overlap` pixels at both ends and never reach zero."""
    position = torch.arange(length, dtype=torch.float32) + 0.5
    return torch.minimum(position, length - position).div(overlap).clamp(max=1)


def _build(config: VAEConfig) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            attn_scales=[],
            temperal_downsample=list(config.temporal_downsample),
        ).eval()
