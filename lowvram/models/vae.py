"""Latents to frames through diffusers' AutoencoderKLWan, in tiles whose size follows from the
video's size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram.checkpoint.names import diffusers_vae_from_official
from lowvram.errors import CheckpointError
from lowvram.planner.vae import VAE_TILE_MARGIN_PIXELS, VAE_TILE_OVERLAP_PIXELS
from lowvram.variants import VAEConfig

# At the picture's own border, where no other tile is, it is divided out.
SMALLEST_WEIGHT = 1e-6


class Piece(NamedTuple):
    """Finished pixels of a clip: frames from `first_frame`, rows from `top`, whole rows. pixels:
    [3, f, rows, W] float32 in -1..1.
    """

    first_frame: int
    top: int
    pixels: Tensor


OnTile = Callable[[int, int], None]  # (tiles done, tiles in all)


class WanVAE:
    """The decoder of one store. `read(name)` gives a tensor by its official name; only the decoder
    is read and goes to the device.

    lean: each module's weights are read when it runs and dropped behind it, at every frame of every
    tile. It changes no bit.
    """

    def __init__(
        self,
        config: VAEConfig,
        tensors: Mapping[str, object],
        read: Callable[[str], Tensor],
        device: torch.device,
        lean: bool = False,
    ) -> None:
        self._config = config
        self._device = device
        model = _build(config)
        names = {}  # diffusers' -> official
        for name in tensors:
            target = diffusers_vae_from_official(name, config)
            if target is None:
                raise CheckpointError(
                    f"the VAE holds {name}, which no Wan VAE has: quantize the model again"
                )
            if target.startswith(("decoder.", "post_quant_conv.")):
                names[target] = name
        if lean:
            for prefix, module in model.named_modules():
                parameters = [
                    name
                    for name, _ in module.named_parameters(recurse=False)
                    if f"{prefix}.{name}" in names
                ]
                _read_when_it_runs(
                    module,
                    {name: names[f"{prefix}.{name}"] for name in parameters},
                    lambda name: read(name).to(device),
                )
        else:
            model.load_state_dict(
                {target: read(name).to(device) for target, name in names.items()},
                assign=True,
                strict=False,
            )
        self._decoder, self._post_quant = model.decoder, model.post_quant_conv
        self._convolutions = sum(
            type(module).__name__ == "WanCausalConv3d" for module in self._decoder.modules()
        )
        self._mean, self._std = (
            torch.tensor(getattr(model.config, name)).view(-1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )

    def decode(
        self, latents: Tensor, tile_pixels: int, progress: OnTile = lambda done, total: None
    ) -> Iterator[Piece]:
        """latents: [C, T, h, w] float32, normalised -> pieces on the host that together are [3, F,
        H, W], each pixel once.

        tile_pixels: 0 for no tiling. It is the plan's, which takes it from the video's size alone:
        another tile gives other bits, so no budget may choose it. The frames of a latent frame are
        handed on as soon as they are done, so a clip never exists as floats; with tiles, one row of
        tiles does.
        """
        latents = latents * self._std.to(latents.device) + self._mean.to(latents.device)
        if tile_pixels:
            yield from self._decode_tiles(latents, tile_pixels, progress)
            return
        progress(0, latents.shape[1])
        first = 0
        for done, pixels in enumerate(self._decode_tile(latents), 1):
            yield Piece(first, 0, pixels)
            first += pixels.shape[1]
            progress(done, latents.shape[1])

    @torch.no_grad()
    def _decode_tile(self, latents: Tensor) -> Iterator[Tensor]:
        """[3, f, H, W] float32 on the host, clamped to -1..1, for one latent frame after another: 1
        frame, then 4 each.
        """
        x = self._post_quant(latents.unsqueeze(0).to(self._device))
        # what each convolution keeps of the frames before
        memory: list[Tensor | str | None] = [None] * self._convolutions
        for frame in range(latents.shape[1]):
            pixels: Tensor = self._decoder(
                x[:, :, frame : frame + 1], feat_cache=memory, feat_idx=[0]
            )
            yield pixels[0].float().clamp_(-1, 1).cpu()

    def _decode_tiles(self, latents: Tensor, tile_pixels: int, progress: OnTile) -> Iterator[Piece]:
        """Tiles overlap and fade into one another in the middle of the overlap; the weights of all
        tiles over a pixel are divided out.

        One row of tiles is held as floats; what no later row touches is finished and handed on.
        """
        stride = self._config.spatial_stride
        tile, step = tile_pixels // stride, (tile_pixels - VAE_TILE_OVERLAP_PIXELS) // stride
        _, count, height, width = latents.shape
        tops, lefts = tile_starts(height, tile, step), tile_starts(width, tile, step)
        total, done = count * len(tops) * len(lefts), 0
        rows = min(tile, height) * stride
        band = torch.zeros(3, (count - 1) * self._config.temporal_stride + 1, rows, width * stride)
        weights = torch.zeros(rows, width * stride)
        progress(done, total)
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            for left in lefts:
                first = 0
                for pixels in self._decode_tile(
                    latents[:, :, top : top + tile, left : left + tile]
                ):
                    columns = slice(left * stride, left * stride + pixels.shape[-1])
                    weight = (
                        _fade(rows, VAE_TILE_OVERLAP_PIXELS)[:, None]
                        * _fade(pixels.shape[-1], VAE_TILE_OVERLAP_PIXELS)[None]
                    )
                    band[:, first : first + pixels.shape[1], :, columns] += pixels.mul_(weight)
                    if first == 0:
                        weights[:, columns] += weight
                    first += pixels.shape[1]
                    done += 1
                    progress(done, total)
            finished = (following - top) * stride
            for frame in range(band.shape[1]):
                yield Piece(
                    frame,
                    top * stride,
                    band[:, frame : frame + 1, :finished].div_(weights[:finished]),
                )
                _move_up(band[:, frame], finished)
            _move_up(weights, finished)


def _move_up(plane: Tensor, rows: int) -> None:
    """Drops the first `rows` of [..., R, W] and fills up with zeros."""
    kept = plane[..., rows:, :].clone()
    plane[..., : kept.shape[-2], :] = kept
    plane[..., kept.shape[-2] :, :] = 0


def tile_starts(length: int, tile: int, step: int) -> list[int]:
    """Starts of tiles that cover 0 .. length, all of them whole wherever `length` allows."""
    last = max(0, length - tile)
    return [*range(0, last, step), last]


def _fade(length: int, overlap: int) -> Tensor:
    """[length] weights that rise over the middle of `overlap` pixels at both ends and never reach
    zero.

    The outermost `VAE_TILE_MARGIN_PIXELS`, whose neighbours the tile does not see, count for
    nothing where another tile covers them.
    """
    position = torch.arange(length, dtype=torch.float32) + 0.5
    inward = torch.minimum(position, length - position) - VAE_TILE_MARGIN_PIXELS
    return inward.div(overlap - 2 * VAE_TILE_MARGIN_PIXELS).clamp(SMALLEST_WEIGHT, 1)


def _read_when_it_runs(
    module: torch.nn.Module, names: Mapping[str, str], read: Callable[[str], Tensor]
) -> None:
    """names: the module's own parameters, all on the meta device -> what `read` knows them by."""
    absent = {parameter: getattr(module, parameter) for parameter in names}

    def fetch(module: torch.nn.Module, inputs: Any) -> None:
        for parameter, name in names.items():
            setattr(module, parameter, torch.nn.Parameter(read(name), requires_grad=False))

    def drop(module: torch.nn.Module, inputs: Any, result: Any) -> None:
        for parameter, empty in absent.items():
            setattr(module, parameter, empty)

    if names:
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


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
