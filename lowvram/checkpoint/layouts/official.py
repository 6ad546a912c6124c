"""The official layout, as in Wan-AI/Wan2.2-T2V-A14B.

Two expert folders, the text encoder and the VAE as single files, the tokenizer under `google/`.
"""

from __future__ import annotations

from pathlib import Path

from lowvram.checkpoint.layouts.infer import infer_text_encoder, infer_vae
from lowvram.checkpoint.layouts.parts import (
    Parts,
    make_dit_config,
    model_config,
    read_sampling,
    read_settings,
    read_tokenizer,
)
from lowvram.checkpoint.readers.files import Settings
from lowvram.checkpoint.readers.shards import open_folder, open_one
from lowvram.errors import CheckpointError
from lowvram.variants import COMPONENTS, EXPERTS, T2V_A14B, DiTConfig

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
    text, vae = T2V_A14B.text_encoder, T2V_A14B.vae
    if dit != T2V_A14B.dit:
        text, vae = infer_text_encoder(raw["text_encoder"].infos), infer_vae(raw["vae"].infos)
    config = model_config(dit, text, vae, read_sampling(root))
    return Parts(
        "official",
        config,
        raw,
        dict.fromkeys(COMPONENTS, _same_name),
        read_tokenizer(root, root / TOKENIZER),
    )


def _same_name(name: str) -> str | None:
    return name


def _dit_config(root: Path, path: Path) -> DiTConfig:
    settings = read_settings(root, path)
    settings.require("model_type", "t2v")
    settings.require("qk_norm", True)
    settings.require("cross_attn_norm", True)
    return make_dit_config(path, lambda: _from_settings(settings))


def _from_settings(settings: Settings) -> DiTConfig:
    patch = settings.integers("patch_size", (1, 2, 2))
    if len(patch) != 3:
        raise CheckpointError(f"{settings.path}: patch_size {list(patch)} is not three integers")
    return DiTConfig(
        dim=settings.integer("dim"),
        ffn_dim=settings.integer("ffn_dim"),
        num_heads=settings.integer("num_heads"),
        num_layers=settings.integer("num_layers", high=1024),
        in_dim=settings.integer("in_dim", 16),
        out_dim=settings.integer("out_dim", 16),
        freq_dim=settings.integer("freq_dim", 256),
        text_dim=settings.integer("text_dim", 4096),
        text_len=settings.integer("text_len", 512),
        patch_size=(patch[0], patch[1], patch[2]),
        eps=settings.number("eps", 1e-6),
    )
