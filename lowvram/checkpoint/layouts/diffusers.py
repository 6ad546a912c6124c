"""The diffusers layout, as in Wan-AI/Wan2.2-T2V-A14B-Diffusers.

One folder per component; `transformer` is the high-noise expert, `transformer_2` the low-noise one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lowvram.checkpoint import names
from lowvram.checkpoint.layouts.parts import (
    Parts,
    Rename,
    make_dit_config,
    model_config,
    read_sampling,
    read_settings,
    read_tokenizer,
)
from lowvram.checkpoint.readers.files import Settings
from lowvram.checkpoint.readers.shards import open_folder
from lowvram.errors import CheckpointError
from lowvram.variants import DiTConfig, SamplingDefaults, TextEncoderConfig, VAEConfig

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


def read_diffusers(root: Path) -> Parts:
    """Read the headers and configs of all components. Raises `CheckpointError`."""
    settings = {
        component: read_settings(root, root / folder / "config.json")
        for component, folder in FOLDERS.items()
    }
    high, low = (_dit_config(settings[component]) for component in ("high_noise", "low_noise"))
    if high != low:
        raise CheckpointError(
            f"{root}: the config.json of transformer and transformer_2 differ: take both "
            f"experts from one model"
        )
    text, vae = _text_config(settings["text_encoder"]), _vae_config(settings["vae"])
    config = model_config(high, text, vae, _sampling(root))
    renames: dict[str, Rename] = {
        "high_noise": names.official_from_diffusers_dit,
        "low_noise": names.official_from_diffusers_dit,
        "text_encoder": names.official_from_transformers_text,
        "vae": partial(names.official_from_diffusers_vae, config=vae),
    }
    raw = {component: open_folder(root, root / folder) for component, folder in FOLDERS.items()}
    return Parts("diffusers", config, raw, renames, read_tokenizer(root, root / TOKENIZER))


def _sampling(root: Path) -> SamplingDefaults:
    sampling = read_sampling(root)
    path = root / "model_index.json"
    if not path.exists():
        return sampling
    settings = read_settings(root, path)
    if settings.data.get("boundary_ratio") is None:
        return sampling
    boundary = settings.number("boundary_ratio")
    if not 0 <= boundary <= 1:
        raise CheckpointError(f"{path}: boundary_ratio {boundary} is outside 0 .. 1")
    return SamplingDefaults(**{**vars(sampling), "boundary": boundary})


def _dit_config(settings: Settings) -> DiTConfig:
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        settings.require(key, None)
    settings.require("qk_norm", "rms_norm_across_heads")
    settings.require("cross_attn_norm", True)
    patch = settings.integers("patch_size", (1, 2, 2))
    if len(patch) != 3:
        raise CheckpointError(f"{settings.path}: patch_size {list(patch)} is not three integers")
    heads, width = settings.integer("num_attention_heads"), settings.integer("attention_head_dim")
    return make_dit_config(
        settings.path,
        lambda: DiTConfig(
            dim=heads * width,
            ffn_dim=settings.integer("ffn_dim"),
            num_heads=heads,
            num_layers=settings.integer("num_layers", high=1024),
            in_dim=settings.integer("in_channels", 16),
            out_dim=settings.integer("out_channels", 16),
            freq_dim=settings.integer("freq_dim", 256),
            text_dim=settings.integer("text_dim", 4096),
            text_len=settings.integer("text_len", 512),
            patch_size=(patch[0], patch[1], patch[2]),
            eps=settings.number("eps", 1e-6),
        ),
    )


def _text_config(settings: Settings) -> TextEncoderConfig:
    settings.require("model_type", "umt5")
    settings.require("feed_forward_proj", "gated-gelu")
    return TextEncoderConfig(
        vocab_size=settings.integer("vocab_size"),
        d_model=settings.integer("d_model"),
        num_heads=settings.integer("num_heads"),
        head_dim=settings.integer("d_kv"),
        d_ff=settings.integer("d_ff"),
        num_layers=settings.integer("num_layers", high=1024),
        num_buckets=settings.integer("relative_attention_num_buckets", 32),
        max_distance=settings.integer("relative_attention_max_distance", 128),
        eps=settings.number("layer_norm_epsilon", 1e-6),
    )


def _vae_config(settings: Settings) -> VAEConfig:
    settings.require("is_residual", False)
    settings.require("attn_scales", [])
    settings.require("patch_size", None)
    config = VAEConfig(
        base_dim=settings.integer("base_dim", 96),
        z_dim=settings.integer("z_dim", 16),
        dim_mult=settings.integers("dim_mult", (1, 2, 4, 4)),
        num_res_blocks=settings.integer("num_res_blocks", 2, high=64),
        temporal_downsample=settings.booleans("temperal_downsample", (False, True, True)),
    )
    if len(config.temporal_downsample) != len(config.dim_mult) - 1:
        levels = len(config.dim_mult)
        raise CheckpointError(
            f"{settings.path}: {levels} levels need {levels - 1} entries in temperal_downsample"
        )
    return config
