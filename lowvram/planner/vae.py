"""Memory that the VAE decoder allocates: its weights and the working set of one tile."""

from __future__ import annotations

import math

from lowvram.planner.allocator import passing_bytes
from lowvram.request import Workload
from lowvram.store.layout import component_layout
from lowvram.variants import ModelConfig, VAEConfig

VAE_TILE_PIXELS = 256
VAE_TILE_OVERLAP_PIXELS = 64
VAE_TILE_MARGIN_PIXELS = 16
FP32 = 4
# On a CPU, torch unfolds the input of a convolution up to this size (channels x frames x rows).
UNFOLDED_BELOW_VALUES = 20480
# Fragmentation of the decoder's large tensors of many sizes, as a share of its working set. Replays
# of its allocations through a model of the allocator gave 0.24 to 0.46; not measured on a GPU.
DECODE_ROUNDING_SHARE = 0.5


def vae_tile_pixels(width: int, height: int) -> int:
    """Tile size for decoding a clip of this size in pixels, 0 for no tiling.

    The tile depends on the size alone, not on the budgets: another tiling changes the neighbors of
    pixels near tile edges, and so the video.
    """
    return VAE_TILE_PIXELS if max(width, height) > VAE_TILE_PIXELS else 0


def decode_bytes(workload: Workload, tile: int) -> tuple[int, int]:
    """(VRAM, RAM) in bytes of the decoding phase.

    VRAM: the decoder's weights and the working set of one tile. RAM: the frames as uint8 and one
    row of tiles as fp32.
    """
    vae, latents = workload.config.vae, workload.latents
    stride = vae.spatial_stride
    weights = _decoder_weight_bytes(workload.config)
    width, height = latents.width * stride, latents.height * stride
    frames = (latents.frames - 1) * vae.temporal_stride + 1
    columns, rows = min(width, tile or width), min(height, tile or height)
    cells = latents.frames * latents.channels * (columns // stride) * (rows // stride)
    # output of the previous latent frame, and its clamped copy
    pixels = 2 * 3 * vae.temporal_stride * rows * columns
    working = (decoder_peak_values(vae, rows // stride, columns // stride) + pixels) * FP32
    video = frames * width * height * 3
    if not tile:
        return weights + working + (cells + math.prod(latents.shape) * 2) * FP32, video
    band = (frames * 3 + 1) * rows * width * FP32
    weight_planes = 2 * rows * columns * FP32
    return weights + working + (
        2 * cells + math.prod(latents.shape) * 2
    ) * FP32, video + band + weight_planes


def decode_rounding_bytes(workload: Workload, tile: int) -> int:
    """VRAM that torch's allocator reserves beyond the tensors of the decoding phase."""
    working = decode_bytes(workload, tile)[0] - _decoder_weight_bytes(workload.config)
    return int(DECODE_ROUNDING_SHARE * working) + passing_bytes()


def _decoder_weight_bytes(config: ModelConfig) -> int:
    layout = component_layout("vae", config, "fp32")
    return sum(
        tensor.nbytes for tensor in layout.tensors if tensor.name.startswith(("decoder.", "conv2."))
    )


def decoder_peak_values(vae: VAEConfig, height: int, width: int) -> int:
    """Peak number of fp32 values in the decoder for a latent frame of height x width cells.

    Counted with full caches (spec 4.2).
    """
    decoder = _Decoder(height, width)
    dims = [vae.base_dim * factor for factor in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    decoder.convolution(vae.z_dim, dims[0])
    for _ in range(2):
        decoder.residual(dims[0], dims[0])
    last = len(vae.dim_mult) - 1
    for level, outputs in enumerate(dims[1:]):
        inputs = dims[level] // 2 if level else dims[level]
        decoder.enter(inputs)
        for _ in range(vae.num_res_blocks + 1):
            decoder.residual(inputs, outputs)
            inputs = outputs
        if level < last:
            decoder.upsample(outputs, temporal=tuple(reversed(vae.temporal_downsample))[level])
        decoder.leave()
    decoder.normalise(dims[-1])
    decoder.convolution(dims[-1], 3)
    return decoder.caches + decoder.peak


class _Decoder:
    """Counts the values of the decoder's tensors, module by module in execution order.

    caches: values of the last two input frames of each convolution.
    peak: peak number of other values, including tensors that callers still hold.
    """

    def __init__(self, height: int, width: int) -> None:
        self.frames, self.height, self.width = 1, height, width
        self.caches = self.peak = 0
        # the input of the current block, which the decoder's loop still references
        self._outer = self._entered = 0

    def _holds(self, values: int) -> None:
        self.peak = max(self.peak, self._outer + values)

    def _size(self, channels: int, frames: int | None = None) -> int:
        return channels * (self.frames if frames is None else frames) * self.height * self.width

    def enter(self, channels: int) -> None:
        """Begin a level with an input of `channels` channels."""
        self._entered = self._size(channels)

    def leave(self) -> None:
        """End a level."""
        self._outer = 0

    def convolution(self, inputs: int, outputs: int, kept: int = 0) -> None:
        """3 x 3 x 3 convolution over cached and new frames: concatenate, pad, convolve a copy.

        kept: values of other tensors that are alive.
        """
        new_cache = self._size(inputs, 2)
        frames, height = self.frames + 2, self.height + 2
        padded = inputs * frames * height * (self.width + 2)
        unfolded = inputs * frames * height <= UNFOLDED_BELOW_VALUES
        scratch = 27 * self._size(inputs) if unfolded else padded
        held = kept + self._size(inputs) + new_cache
        self._holds(held + self._size(inputs, frames) + padded)
        self._holds(held + padded + scratch + self._size(outputs))
        self.caches += new_cache

    def normalise(self, channels: int, kept: int = 0) -> None:
        """RMSNorm: input, normalized, scaled and result; kept: values of other live tensors."""
        self._holds(kept + 4 * self._size(channels))

    def residual(self, inputs: int, outputs: int) -> None:
        """Residual block: norm, convolution, norm, convolution, and a shortcut if widths differ."""
        kept = self._size(inputs)
        if inputs != outputs:
            self._holds(3 * kept + self._size(outputs))
            kept += self._size(outputs)
        self.normalise(inputs, kept - self._size(inputs))
        self.convolution(inputs, outputs, kept)
        self.normalise(outputs, kept)
        self.convolution(outputs, outputs, kept)
        # from the second residual block on, `kept` no longer counts the level's input
        self._outer = self._entered

    def upsample(self, channels: int, temporal: bool) -> None:
        """Upsampling layer, which doubles height and width and, if `temporal`, the frames."""
        kept = self._size(channels)
        if temporal:
            joined, new_cache = self._size(channels, self.frames + 2), self._size(channels, 2)
            self._holds(kept + new_cache + 2 * joined)
            # unfolded or copied, and the result
            self._holds(kept + new_cache + joined + max(3 * kept, joined) + 2 * kept)
            self._holds(5 * kept)  # the result, and a copy with interleaved frames
            self.caches += new_cache
            self.frames *= 2
        copied = self._size(channels)
        self._holds(kept + 2 * copied)
        self.height, self.width = 2 * self.height, 2 * self.width
        enlarged = self._size(channels)
        self._holds(kept + copied + 2 * enlarged + self._size(channels // 2))
