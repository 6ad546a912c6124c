"""Infer the configs of a text encoder and a VAE from the shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lowvram.checkpoint.readers.safetensors_header import TensorInfo, quoted
from lowvram.errors import MissingTensorsError
from lowvram.variants import TextEncoderConfig, VAEConfig

Tensors = Mapping[str, TensorInfo]


def infer_text_encoder(tensors: Tensors) -> TextEncoderConfig:
    """Infer the config of a UMT5 encoder from its tensors, under official names.

    Raises `MissingTensorsError` when a tensor that it needs is missing or of the wrong rank.
    """
    vocab_size, d_model = _sizes(tensors, "token_embedding.weight", 2)
    num_buckets, num_heads = _sizes(tensors, "blocks.0.pos_embedding.embedding.weight", 2)
    inner, _ = _sizes(tensors, "blocks.0.attn.q.weight", 2)
    d_ff, _ = _sizes(tensors, "blocks.0.ffn.fc1.weight", 2)
    if inner % num_heads:
        raise MissingTensorsError(
            f"text_encoder: {num_heads} heads do not divide the width {inner} of "
            f"blocks.0.attn.q.weight"
        )
    return TextEncoderConfig(
        vocab_size,
        d_model,
        num_heads,
        inner // num_heads,
        d_ff,
        len(_indices(tensors, "blocks")),
        num_buckets,
    )


def infer_vae(tensors: Tensors) -> VAEConfig:
    """Infer the config of a Wan2.1 VAE from its tensors, under official names.

    Raises `MissingTensorsError` when the tensors are not those of a Wan2.1 VAE.
    """
    base_dim = _sizes(tensors, "encoder.conv1.weight", 5)[0]
    z_dim = _sizes(tensors, "conv2.weight", 5)[0]
    widths, blocks, temporal = [base_dim], [0], []
    for index in _indices(tensors, "encoder.downsamples"):
        name = f"encoder.downsamples.{index}"
        if f"{name}.resample.1.weight" in tensors or f"{name}.time_conv.weight" in tensors:
            temporal.append(f"{name}.time_conv.weight" in tensors)
            widths.append(widths[-1])
            blocks.append(0)
        else:
            widths[-1] = _sizes(tensors, f"{name}.residual.2.weight", 5)[0]
            blocks[-1] += 1
    if not all(blocks) or any(width % base_dim for width in widths):
        raise MissingTensorsError(
            f"vae: levels of widths {widths} with {blocks} residual blocks are not a Wan2.1 "
            f"VAE of base {base_dim}"
        )
    return VAEConfig(
        base_dim, z_dim, tuple(width // base_dim for width in widths), blocks[0], tuple(temporal)
    )


def _sizes(tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    info = tensors.get(name)
    if info is None:
        raise MissingTensorsError(
            f"{quoted(name)} is missing: the size of the model is inferred from it"
        )
    if len(info.shape) != rank or 0 in info.shape:
        raise MissingTensorsError(
            f"{quoted(name)} has the shape {list(info.shape)}, expected {rank} dimensions"
        )
    return info.shape


def _indices(tensors: Tensors, group: str) -> list[int]:
    matches = (re.match(rf"{re.escape(group)}\.(0|[1-9][0-9]{{0,5}})\.", name) for name in tensors)
    return sorted({int(match[1]) for match in matches if match})
