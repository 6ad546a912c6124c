"""The diffusers layout, as in Wan-AI/Wan2.2-T2V-A14B-Diffusers.

One folder per component; `transformer` is the high-noise expert, `transformer_2` the low-noise one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from lowvram.checkpoint import names
from lowvram.checkpoint.layouts.parts import (
    Parts,
    Rename,
    errors_of,
    model_config,
    read_tokenizer,
    require_norms,
)
from lowvram.checkpoint.readers.files import read_settings
from lowvram.checkpoint.readers.shards import open_folder
from lowvram.errors import CheckpointError
from lowvram.variants import (
    EXPERTS,
    DiTConfig,
    Layers,
    ModelConfig,
    Multipliers,
    Number,
    Size,
    Switches,
    TextEncoderConfig,
    VAEConfig,
)

FOLDERS = {
    "high_noise": "transformer",
    "low_noise": "transformer_2",
    "text_encoder": "text_encoder",
    "vae": "vae",
}
TOKENIZER = Path("tokenizer", "tokenizer.json")


def looks_diffusers(root: Path) -> bool:
    """Whether the folder has the diffusers layout."""
    return (root / "model_index.json").is_file() or (root / "transformer").is_dir()


class TransformerConfig(msgspec.Struct, frozen=True):
    """What the config.json of a transformer says; other keys are not read."""

    num_attention_heads: Size
    attention_head_dim: Size
    ffn_dim: Size
    num_layers: Layers
    image_dim: None = None
    added_kv_proj_dim: None = None
    pos_embed_seq_len: None = None
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    cross_attn_norm: bool = True
    in_channels: Size = 16
    out_channels: Size = 16
    freq_dim: Size = 256
    text_dim: Size = 4096
    text_len: Size = 512
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    eps: Number = 1e-6

    def __post_init__(self) -> None:
        require_norms(True, self.cross_attn_norm)

    def dit(self) -> DiTConfig:
        """The dimensions of the expert. Raises `UsageError` where they do not fit each other."""
        return DiTConfig(
            dim=self.num_attention_heads * self.attention_head_dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.num_attention_heads,
            num_layers=self.num_layers,
            in_dim=self.in_channels,
            out_dim=self.out_channels,
            freq_dim=self.freq_dim,
            text_dim=self.text_dim,
            text_len=self.text_len,
            patch_size=self.patch_size,
            eps=self.eps,
        )


class EncoderConfig(msgspec.Struct, frozen=True):
    """What the config.json of the text encoder says; other keys are not read."""

    vocab_size: Size
    d_model: Size
    num_heads: Size
    d_kv: Size
    d_ff: Size
    num_layers: Layers
    model_type: Literal["umt5"] = "umt5"
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    layer_norm_epsilon: Number = 1e-6

    def encoder(self) -> TextEncoderConfig:
        """The dimensions of the text encoder."""
        return TextEncoderConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_heads=self.num_heads,
            head_dim=self.d_kv,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
            eps=self.layer_norm_epsilon,
        )


class AutoencoderConfig(msgspec.Struct, frozen=True):
    """What the config.json of the VAE says; other keys are not read."""

    base_dim: Size = 96
    z_dim: Size = 16
    dim_mult: Multipliers = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    temperal_downsample: Switches = (False, True, True)  # diffusers' own spelling
    is_residual: bool = False
    attn_scales: Annotated[tuple[float, ...], msgspec.Meta(max_length=0)] = ()
    patch_size: None = None

    def __post_init__(self) -> None:
        if self.is_residual:
            raise ValueError("is_residual is True, expected false, all that this version reads")
        levels = len(self.dim_mult)
        if len(self.temperal_downsample) != levels - 1:
            raise ValueError(f"{levels} levels need {levels - 1} entries in temperal_downsample")

    def vae(self) -> VAEConfig:
        """The dimensions of the VAE."""
        return VAEConfig(
            base_dim=self.base_dim,
            z_dim=self.z_dim,
            dim_mult=self.dim_mult,
            num_res_blocks=self.num_res_blocks,
            temporal_downsample=self.temperal_downsample,
        )


class ModelIndex(msgspec.Struct, frozen=True):
    """What model_index.json says of sampling."""

    boundary_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


def read_diffusers(root: Path) -> Parts:
    """Read the headers and configs of all components. Raises `CheckpointError`."""
    high, low = (_dit_config(root, component) for component in EXPERTS)
    if high != low:
        raise CheckpointError(
            f"{root}: the config.json of transformer and transformer_2 differ: take both "
            f"experts from one model"
        )
    text = read_settings(root, _config_path(root, "text_encoder"), EncoderConfig).encoder()
    vae = read_settings(root, _config_path(root, "vae"), AutoencoderConfig).vae()
    config = _with_boundary(root, model_config(root, high, text, vae))
    renames: dict[str, Rename] = {
        "high_noise": names.official_from_diffusers_dit,
        "low_noise": names.official_from_diffusers_dit,
        "text_encoder": names.official_from_transformers_text,
        "vae": partial(names.official_from_diffusers_vae, config=vae),
    }
    raw = {component: open_folder(root, root / folder) for component, folder in FOLDERS.items()}
    return Parts("diffusers", config, raw, renames, read_tokenizer(root, root / TOKENIZER))


def _config_path(root: Path, component: str) -> Path:
    return root / FOLDERS[component] / "config.json"


def _dit_config(root: Path, component: str) -> DiTConfig:
    path = _config_path(root, component)
    settings = read_settings(root, path, TransformerConfig)
    with errors_of(path):
        return settings.dit()


def _with_boundary(root: Path, config: ModelConfig) -> ModelConfig:
    """The config with the boundary that model_index.json names."""
    path = root / "model_index.json"
    boundary = read_settings(root, path, ModelIndex).boundary_ratio if path.exists() else None
    if boundary is None:
        return config
    return replace(config, sampling=replace(config.sampling, boundary=boundary))
