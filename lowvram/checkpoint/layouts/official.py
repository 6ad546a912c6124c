"""The official layout, as in Wan-AI/Wan2.2-T2V-A14B.

Two expert folders, the text encoder and the VAE as single files, the tokenizer under `google/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from lowvram.checkpoint.layouts.infer import infer_text_encoder, infer_vae
from lowvram.checkpoint.layouts.parts import (
    Parts,
    errors_of,
    model_config,
    read_tokenizer,
    require_norms,
)
from lowvram.checkpoint.readers.files import read_settings
from lowvram.checkpoint.readers.shards import open_folder, open_one
from lowvram.errors import CheckpointError
from lowvram.variants import COMPONENTS, EXPERTS, DiTConfig, Layers, Number, Size, variant_of

FOLDERS = {component: f"{component}_model" for component in EXPERTS}
STEMS = {"text_encoder": "models_t5_umt5-xxl-enc-bf16", "vae": "Wan2.1_VAE"}
TOKENIZER = Path("google", "umt5-xxl", "tokenizer.json")


def looks_official(root: Path) -> bool:
    """Whether the folder has the official layout."""
    return any((root / folder).is_dir() for folder in FOLDERS.values())


def read_official(root: Path, allow_pickle: bool) -> Parts:
    """Read the headers and configs of all components. Raises `CheckpointError`."""
    configs = {
        component: _dit_config(root, root / folder / "config.json")
        for component, folder in FOLDERS.items()
    }
    dit = configs["high_noise"]
    if configs["low_noise"] != dit:
        both = " and ".join(FOLDERS.values())
        raise CheckpointError(
            f"{root}: the config.json of {both} differ: take both experts from one model"
        )
    raw = {component: open_folder(root, root / folder) for component, folder in FOLDERS.items()}
    raw |= {component: open_one(root, stem, allow_pickle) for component, stem in STEMS.items()}
    variant = variant_of(dit)
    if variant is not None:
        text, vae = variant.config.text_encoder, variant.config.vae
    else:
        text, vae = infer_text_encoder(raw["text_encoder"].infos), infer_vae(raw["vae"].infos)
    config = model_config(root, dit, text, vae)
    return Parts(
        "official",
        config,
        raw,
        dict.fromkeys(COMPONENTS, _same_name),
        read_tokenizer(root, root / TOKENIZER),
    )


def _same_name(name: str) -> str | None:
    return name


class ExpertConfig(msgspec.Struct, frozen=True):
    """What an expert's config.json says of its dimensions; other keys are not read."""

    dim: Size
    ffn_dim: Size
    num_heads: Size
    num_layers: Layers
    model_type: Literal["t2v"] = "t2v"
    qk_norm: bool = True
    cross_attn_norm: bool = True
    in_dim: Size = 16
    out_dim: Size = 16
    freq_dim: Size = 256
    text_dim: Size = 4096
    text_len: Size = 512
    patch_size: tuple[Size, Size, Size] = (1, 2, 2)
    eps: Number = 1e-6

    def __post_init__(self) -> None:
        require_norms(self.qk_norm, self.cross_attn_norm)

    def dit(self) -> DiTConfig:
        """The dimensions of the expert. Raises `UsageError` where they do not fit each other."""
        return DiTConfig(
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            in_dim=self.in_dim,
            out_dim=self.out_dim,
            freq_dim=self.freq_dim,
            text_dim=self.text_dim,
            text_len=self.text_len,
            patch_size=self.patch_size,
            eps=self.eps,
        )


def _dit_config(root: Path, path: Path) -> DiTConfig:
    settings = read_settings(root, path, ExpertConfig)
    with errors_of(path):
        return settings.dit()
