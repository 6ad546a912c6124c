"""What each phase of a run allocates beside blocks and workspace, in bytes: pure arithmetic, no torch."""

from __future__ import annotations

from lowvram.checkpoint.store_layout import component_layout
from lowvram.config import LatentShape, ModelConfig, VAEConfig
from lowvram.memory.workspace import aligned, element_bytes

VAE_TILE_PIXELS = 256
VAE_TILE_OVERLAP_PIXELS = 64
# Values per output pixel at base width 96: the decoder's caches (spec 4.2) and six full-resolution activations of four frames.
VAE_CACHE_VALUES = 2364.5
VAE_ACTIVATION_VALUES = 6 * 4 * 96


def conditioning_bytes(config: ModelConfig, format: str, steps: int) -> int:
    """VRAM that lives through the loop, of both experts: modulation of every step, both prompts' context, patch embedding and head."""
    dit = config.dit
    compute, _ = element_bytes(format)
    per_expert = steps * 7 * dit.dim * 4 + 2 * dit.text_len * dit.dim * compute
    patch = dit.dim * dit.in_dim * 4 * compute + dit.dim * dit.out_dim * 16 + 8 * dit.dim * 4
    return 2 * aligned(per_expert + patch)


def token_io_bytes(config: ModelConfig, latents: LatentShape, format: str) -> int:
    """VRAM of the patched input and the head's output of all tokens."""
    return latents.num_tokens * 4 * (config.dit.in_dim + config.dit.out_dim) * 4


def text_bytes(config: ModelConfig, format: str, block_bytes: int, staging: int) -> tuple[int, int]:
    """(VRAM, RAM) of the text encoder: two slots, one linear's weights as floats, and the activations of one prompt."""
    text = config.text_encoder
    compute, _ = element_bytes(format)
    inner = text.num_heads * text.head_dim
    length = config.dit.text_len
    weights = 2 * text.d_ff * text.d_model * 4
    activations = length * (4 * text.d_model + 4 * inner + 3 * text.d_ff) * 4 + 3 * text.num_heads * length * length * 4
    return 2 * block_bytes + weights + 2 * activations, staging * block_bytes + 2 * length * text.d_model * compute


def vae_decode_values_per_pixel(vae: VAEConfig) -> float:
    """fp32 values that decoding holds per output pixel, the official width's count scaled by this VAE's base width."""
    return (VAE_CACHE_VALUES + VAE_ACTIVATION_VALUES) * vae.base_dim / 96


def decode_bytes(config: ModelConfig, latents: LatentShape, tile: int) -> tuple[int, int]:
    """(VRAM, RAM): the VAE's weights and one tile's working set; the whole clip as floats and as bytes on the host."""
    vae = config.vae
    weights = component_layout("vae", config, "fp32").total_bytes
    width, height = latents.width * vae.spatial_stride, latents.height * vae.spatial_stride
    frames = (latents.frames - 1) * vae.temporal_stride + 1
    pixels = min(width, tile or width) * min(height, tile or height)
    working = int(vae_decode_values_per_pixel(vae) * pixels * 4) + 3 * frames * pixels * 4 * 2
    return weights + working, frames * width * height * (3 * 4 + 4 + 3) + 3 * frames * pixels * 4
