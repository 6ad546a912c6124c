"""Tiny random models in the file layouts that people have on disk, for tests. The same seed gives
the same weights in every layout.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lowvram.checkpoint import names
from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.store.layout import StoredTensor, component_layout, marker_bytes
from lowvram.store.manifest import ComponentManifest, Manifest, component_file, read_manifest
from lowvram.store.reader import StoreFile
from lowvram.store.writer import JOURNAL, StoreWriter
from lowvram.variants import (
    COMPONENTS,
    DiTConfig,
    ModelConfig,
    SamplingDefaults,
    TextEncoderConfig,
    VAEConfig,
)

Weights = dict[str, torch.Tensor]


def tiny_config(**dit_changes: Any) -> ModelConfig:
    """Two blocks of dim 256: every matrix is wide enough for the rotation by 256; a whole model is
    about 15 MB in fp32.
    """
    dit = {
        "dim": 256,
        "ffn_dim": 512,
        "num_heads": 2,
        "num_layers": 2,
        "text_dim": 256,
        "text_len": 32,
    } | dit_changes
    text = TextEncoderConfig(
        vocab_size=256, d_model=256, num_heads=4, head_dim=64, d_ff=256, num_layers=2
    )
    vae = VAEConfig(base_dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
    return ModelConfig("t2v-custom", DiTConfig(**dit), text, vae)


def component_shapes(config: ModelConfig, component: str) -> dict[str, tuple[int, ...]]:
    if component == "text_encoder":
        return names.text_encoder_shapes(config.text_encoder)
    return names.vae_shapes(config.vae) if component == "vae" else names.dit_shapes(config.dit)


def tiny_weights(
    config: ModelConfig, component: str, seed: int = 0, dtype: torch.dtype | None = None
) -> Weights:
    """Random weights under official names, scaled so that activations stay near 1.

    The default dtypes are those of the official files: experts and VAE in fp32, text encoder in
    bf16.
    """
    dtype = dtype or (torch.bfloat16 if component == "text_encoder" else torch.float32)
    return {
        name: tensor.clone() for name, tensor in _weights(config, component, seed, dtype).items()
    }


@lru_cache(maxsize=64)
def _weights(config: ModelConfig, component: str, seed: int, dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(seed * 1000 + COMPONENTS.index(component))
    return {
        name: _random(name, shape, generator).to(dtype).contiguous()
        for name, shape in component_shapes(config, component).items()
    }  # fmt: skip


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    value = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return value * 0.02
    if "norm" in name or name.endswith("gamma"):
        return 1 + 0.1 * value
    if "embedding.embedding" in name or name.startswith("token_embedding"):
        return value
    if "modulation" in name:
        return value * float(shape[-1] ** -0.5)
    return value * float(value[0].numel() ** -0.5)


def write_official(
    path: Path,
    config: ModelConfig,
    seed: int = 0,
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
    pickle: bool = False,
) -> Path:
    """The layout of Wan-AI/Wan2.2-T2V-A14B; `dtype` is that of the experts; `pickle` writes T5 and
    VAE as `.pth` like the original.
    """
    for component in ("high_noise", "low_noise"):
        folder = path / f"{component}_model"
        write_shards(
            folder, "diffusion_pytorch_model", tiny_weights(config, component, seed, dtype), shards
        )
        write_json(folder / "config.json", official_dit_config(config.dit))
    for component, stem in (("text_encoder", "models_t5_umt5-xxl-enc-bf16"), ("vae", "Wan2.1_VAE")):
        weights = tiny_weights(config, component, seed)
        if pickle:
            torch.save(weights, path / f"{stem}.pth")
        else:
            save_file(weights, path / f"{stem}.safetensors")
    write_tokenizer(path / "google" / "umt5-xxl")
    _write_defaults(path, config)
    return path


def write_diffusers(
    path: Path,
    config: ModelConfig,
    seed: int = 0,
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The layout of Wan-AI/Wan2.2-T2V-A14B-Diffusers, with the weights of `write_official` for the
    same seed.
    """
    for component, folder in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        weights = renamed(
            tiny_weights(config, component, seed, dtype), names.diffusers_dit_from_official
        )
        write_shards(path / folder, "diffusion_pytorch_model", weights, shards)
        write_json(path / folder / "config.json", diffusers_dit_config(config.dit))
    weights = renamed(
        tiny_weights(config, "text_encoder", seed), names.transformers_text_from_official
    )
    write_shards(path / "text_encoder", "model", weights, shards)
    write_json(path / "text_encoder" / "config.json", transformers_text_config(config.text_encoder))
    weights = renamed(
        tiny_weights(config, "vae", seed),
        lambda name: names.diffusers_vae_from_official(name, config.vae),
    )
    write_shards(path / "vae", "diffusion_pytorch_model", weights, 1)
    write_json(path / "vae" / "config.json", diffusers_vae_config(config.vae))
    write_json(
        path / "model_index.json",
        {"_class_name": "WanPipeline", "boundary_ratio": config.sampling.boundary},
    )
    write_tokenizer(path / "tokenizer")
    _write_defaults(path, config)
    return path


def write_store(path: Path, config: ModelConfig, format: str = "int8-plain", seed: int = 0) -> Path:
    """A complete store of `tiny_weights` without the quantizer: rows scaled by their absmax, never
    rotated (`int8` is not a true one).
    """
    path.mkdir(parents=True, exist_ok=True)
    components = {}
    for component in COMPONENTS:
        layout = component_layout(component, config, format)
        weights = tiny_weights(config, component, seed)
        with StoreWriter(
            path / component_file(component), layout.tensors, layout.metadata(), {}, resume=False
        ) as writer:
            for tensor in layout.tensors:
                writer.write(_stored(tensor, weights[tensor.source], layout.format))
            components[component] = ComponentManifest(
                component_file(component), writer.header_sha256, writer.finish()
            )
    tokenizer = tokenizer_json().encode()
    (path / "tokenizer.json").write_bytes(tokenizer)
    digest = hashlib.sha256(tokenizer).hexdigest()
    Manifest(config, format, {"format": format}, {"layout": "test"}, components, digest, "0").write(
        path
    )
    for journal in path.glob(f"*{JOURNAL}"):
        journal.unlink()
    return path


def _stored(tensor: StoredTensor, weight: torch.Tensor, format: str) -> torch.Tensor:
    largest = 448.0 if format == "fp8" else 127.0
    if tensor.role == "marker":
        return torch.frombuffer(bytearray(marker_bytes(format)), dtype=torch.uint8)
    if tensor.role == "copy":
        return weight.to(TORCH_DTYPES[tensor.dtype])
    scale = weight.float().abs().amax(dim=1, keepdim=True) / largest
    if tensor.role == "scale":
        return scale
    scaled = weight.float() / scale
    return (scaled if format == "fp8" else scaled.round()).to(TORCH_DTYPES[tensor.dtype])


def renamed(weights: Weights, rename: Any) -> Weights:
    result = {rename(name): tensor for name, tensor in weights.items()}
    if None in result or len(result) != len(weights):
        raise ValueError("a name has no counterpart")
    return result


def write_shards(folder: Path, stem: str, weights: Weights, shards: int) -> None:
    """One safetensors file, or `shards` of them of about equal size with the index that names
    them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(weights, folder / f"{stem}.safetensors")
        return
    total = sum(tensor.nbytes for tensor in weights.values())
    parts: list[Weights] = [{} for _ in range(shards)]
    written = 0
    for name, tensor in weights.items():
        parts[min(shards - 1, written * shards // total)][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file_name = f"{stem}-{number:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def accept_changes(store: Path, component: str, name: str) -> None:
    """Write the manifest of a store anew, with the hash that a changed tensor has now."""
    manifest = read_manifest(store)
    with StoreFile(store / component_file(component)) as file:
        data = file.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
    record = manifest.components[component]
    tensors = record.tensors | {name: hashlib.sha256(data).hexdigest()}
    components = manifest.components | {component: replace(record, tensors=tensors)}
    replace(manifest, components=components).write(store)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def official_dit_config(dit: DiTConfig) -> dict[str, Any]:
    data: dict[str, Any] = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": "t2v",
        "text_len": dit.text_len,
    }
    if dit.text_dim != 4096:
        data["text_dim"] = dit.text_dim
    keys = ("in_dim", "dim", "ffn_dim", "freq_dim", "out_dim", "num_heads", "num_layers", "eps")
    return data | {key: getattr(dit, key) for key in keys}


def diffusers_dit_config(dit: DiTConfig) -> dict[str, Any]:
    return {
        "text_len": dit.text_len,  # not a key of diffusers, which always uses 512
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(dit.patch_size),
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.head_dim,
        "in_channels": dit.in_dim,
        "out_channels": dit.out_dim,
        "text_dim": dit.text_dim,
        "freq_dim": dit.freq_dim,
        "ffn_dim": dit.ffn_dim,
        "num_layers": dit.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": dit.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }


def transformers_text_config(text: TextEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": text.vocab_size,
        "d_model": text.d_model,
        "d_kv": text.head_dim,
        "num_heads": text.num_heads,
        "d_ff": text.d_ff,
        "num_layers": text.num_layers,
        "relative_attention_num_buckets": text.num_buckets,
        "relative_attention_max_distance": text.max_distance,
        "layer_norm_epsilon": text.eps,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def diffusers_vae_config(vae: VAEConfig) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": vae.base_dim,
        "z_dim": vae.z_dim,
        "dim_mult": list(vae.dim_mult),
        "num_res_blocks": vae.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(vae.temporal_downsample),
    }


def tokenizer_json() -> str:
    """A unigram tokenizer like UMT5's: `<pad>` 0, `</s>` 1, `<s>` 2, `<unk>` 3, then letters and a
    few words; `</s>` is appended.
    """
    pieces = [
        "▁",
        *(chr(code) for code in range(33, 127)),
        "▁a",
        "▁red",
        "▁blue",
        "▁ball",
        "▁moves",
        "▁left",
        "▁right",
    ]
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -4.0 - 0.01 * i) for i, piece in enumerate(pieces)),
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")


def _write_defaults(path: Path, config: ModelConfig) -> None:
    normal = asdict(SamplingDefaults())
    changed = {
        key: value
        for key, value in asdict(config.sampling).items()
        if value != normal[key] and key != "boundary"
    }
    if changed:
        write_json(path / "lowvram_defaults.json", changed)
