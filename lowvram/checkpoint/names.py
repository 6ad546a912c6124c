"""Names and shapes of all tensors of Wan2.2, and maps to diffusers and transformers names."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lowvram.variants import DiTConfig, TextEncoderConfig, VAEConfig

Shape = tuple[int, ...]
_INDEX = r"(0|[1-9][0-9]{0,5})"

# Official module -> diffusers module. The norms are numbered differently: official norm3 is the
# second norm of the block (spec section 2.3).
_DIT_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_DIT_BLOCK_MODULES = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
for _ours, _theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    _DIT_BLOCK_MODULES |= {f"{_ours}.{letter}": f"{_theirs}.to_{letter}" for letter in "qkv"}
    _DIT_BLOCK_MODULES |= {f"{_ours}.o": f"{_theirs}.to_out.0"}
    _DIT_BLOCK_MODULES |= {f"{_ours}.norm_{letter}": f"{_theirs}.norm_{letter}" for letter in "qk"}

# Official module -> transformers module (spec section 3.4).
_TEXT_MODULES = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_TEXT_BLOCK_MODULES = {
    "norm1": "layer.0.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TEXT_BLOCK_MODULES |= {f"attn.{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"}

# Official module -> diffusers module (spec section 4.3).
_VAE_MODULES = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
for _part in ("encoder", "decoder"):
    _VAE_MODULES |= {
        f"{_part}.conv1": f"{_part}.conv_in",
        f"{_part}.head.0": f"{_part}.norm_out",
        f"{_part}.head.2": f"{_part}.conv_out",
    }
_VAE_LAYER_MODULES = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
    "resample.1": "resample.1",
    "time_conv": "time_conv",
    "norm": "norm",
    "to_qkv": "to_qkv",
    "proj": "proj",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _rename(name: str, table: dict[str, str]) -> str | None:
    """Rename the module by `table`; keep the leaf (`weight`, `bias`, `gamma`, or none)."""
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias", "gamma"):
        module, dot, leaf = name, "", ""
    found = table.get(module)
    return None if found is None else found + dot + leaf


def _rename_numbered(
    name: str, prefix: str, new_prefix: str, blocks: dict[str, str], rest: dict[str, str]
) -> str | None:
    match = re.fullmatch(rf"{re.escape(prefix)}\.{_INDEX}\.(.+)", name)
    if match is None:
        return _rename(name, rest)
    inner = _rename(match[2], blocks)
    return None if inner is None else f"{new_prefix}.{match[1]}.{inner}"


def official_from_diffusers_dit(name: str) -> str | None:
    """Official name of a DiT tensor, from its diffusers name; None for an unknown name.

    `blocks.0.attn1.to_q.weight` -> `blocks.0.self_attn.q.weight`.
    """
    return _rename_numbered(
        name, "blocks", "blocks", _inverse(_DIT_BLOCK_MODULES), _inverse(_DIT_MODULES)
    )


def diffusers_dit_from_official(name: str) -> str | None:
    """Inverse of `official_from_diffusers_dit`; None for an unknown name."""
    return _rename_numbered(name, "blocks", "blocks", _DIT_BLOCK_MODULES, _DIT_MODULES)


def official_from_transformers_text(name: str) -> str | None:
    """Official name of a UMT5 tensor, from its transformers name; None for an unknown name.

    `encoder.block.0.layer.0.SelfAttention.q.weight` -> `blocks.0.attn.q.weight`. Both names of the
    tied embedding, `shared` and `encoder.embed_tokens`, give `token_embedding`.
    """
    if name == "encoder.embed_tokens.weight":
        return "token_embedding.weight"
    return _rename_numbered(
        name, "encoder.block", "blocks", _inverse(_TEXT_BLOCK_MODULES), _inverse(_TEXT_MODULES)
    )


def transformers_text_from_official(name: str) -> str | None:
    """Inverse of `official_from_transformers_text`; the embedding becomes `shared.weight`."""
    return _rename_numbered(name, "blocks", "encoder.block", _TEXT_BLOCK_MODULES, _TEXT_MODULES)


def diffusers_vae_from_official(name: str, config: VAEConfig) -> str | None:
    """Diffusers name of a VAE tensor, from its official name; None for an unknown name.

    `decoder.upsamples.3.time_conv.bias` -> `decoder.up_blocks.0.upsamplers.0.time_conv.bias` with
    two residual blocks per level.
    """
    match = re.fullmatch(
        rf"(encoder\.downsamples|decoder\.upsamples|encoder\.middle|decoder\.middle)\.{_INDEX}\.(.+)",
        name,
    )
    if match is None:
        return _rename(name, _VAE_MODULES)
    inner = _rename(match[3], _VAE_LAYER_MODULES)
    place = _diffusers_vae_layer(match[1], int(match[2]), config)
    return None if inner is None or place is None else f"{place}.{inner}"


def _diffusers_vae_layer(group: str, index: int, config: VAEConfig) -> str | None:
    part = group.split(".")[0]
    if group == "encoder.downsamples":
        return f"encoder.down_blocks.{index}"
    if group == "decoder.upsamples":
        level, layer = divmod(index, config.num_res_blocks + 2)
        inside = f"resnets.{layer}" if layer <= config.num_res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{inside}"
    middle = _MIDDLE.get(str(index))
    return None if middle is None else f"{part}.mid_block.{middle}"


def official_from_diffusers_vae(name: str, config: VAEConfig) -> str | None:
    """Inverse of `diffusers_vae_from_official`; None for an unknown name."""
    up = rf"up_blocks\.{_INDEX}\.(resnets|upsamplers)\.{_INDEX}"
    match = re.fullmatch(
        rf"(encoder|decoder)\.(?:(down_blocks)\.{_INDEX}|{up}|mid_block\.(\w+\.\d))\.(.+)", name
    )
    if match is None:
        return _rename(name, _inverse(_VAE_MODULES))
    part, down, down_index, level, kind, layer, middle, inner_name = match.groups()
    inner = _rename(inner_name, _inverse(_VAE_LAYER_MODULES))
    if inner is None or (part == "encoder" and level) or (part == "decoder" and down):
        return None
    if down:
        return f"encoder.downsamples.{down_index}.{inner}"
    if middle:
        index = _inverse(_MIDDLE).get(middle)
        return None if index is None else f"{part}.middle.{index}.{inner}"
    inside = int(layer) if kind == "resnets" else int(layer) + config.num_res_blocks + 1
    known = int(layer) <= config.num_res_blocks if kind == "resnets" else int(layer) == 0
    return (
        f"decoder.upsamples.{int(level) * (config.num_res_blocks + 2) + inside}.{inner}"
        if known
        else None
    )


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def dit_shapes(config: DiTConfig) -> dict[str, Shape]:
    """Shapes of all tensors of one expert, by official name and in official module order.

    15 tensors and 27 per block: 1095 for A14B.
    """
    dim, patch = config.dim, config.patch_size
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (dim, config.in_dim, *patch),
        "patch_embedding.bias": (dim,),
    }
    shapes |= _linear("text_embedding.0", dim, config.text_dim) | _linear(
        "text_embedding.2", dim, dim
    )
    shapes |= _linear("time_embedding.0", dim, config.freq_dim) | _linear(
        "time_embedding.2", dim, dim
    )
    shapes |= _linear("time_projection.1", 6 * dim, dim)
    for index in range(config.num_layers):
        shapes |= {
            f"blocks.{index}.{name}": shape for name, shape in _dit_block_shapes(config).items()
        }
    outputs = config.out_dim * patch[0] * patch[1] * patch[2]
    return shapes | {"head.modulation": (1, 2, dim)} | _linear("head.head", outputs, dim)


def _dit_block_shapes(config: DiTConfig) -> dict[str, Shape]:
    dim = config.dim
    shapes: dict[str, Shape] = {"modulation": (1, 6, dim)}
    for attention in ("self_attn", "cross_attn"):
        for letter in "qkvo":
            shapes |= _linear(f"{attention}.{letter}", dim, dim)
        shapes |= {f"{attention}.norm_{letter}.weight": (dim,) for letter in "qk"}
        if attention == "self_attn":
            shapes |= {"norm3.weight": (dim,), "norm3.bias": (dim,)}
    return shapes | _linear("ffn.0", config.ffn_dim, dim) | _linear("ffn.2", dim, config.ffn_dim)


def text_encoder_shapes(config: TextEncoderConfig) -> dict[str, Shape]:
    """Shapes of all tensors of the UMT5 encoder, by official name.

    2 tensors and 10 per block: 242 for UMT5-XXL.
    """
    dim, inner, hidden = config.d_model, config.num_heads * config.head_dim, config.d_ff
    shapes: dict[str, Shape] = {"token_embedding.weight": (config.vocab_size, dim)}
    for index in range(config.num_layers):
        block = {
            "norm1.weight": (dim,),
            "attn.q.weight": (inner, dim),
            "attn.k.weight": (inner, dim),
            "attn.v.weight": (inner, dim),
            "attn.o.weight": (dim, inner),
            "norm2.weight": (dim,),
            "ffn.gate.0.weight": (hidden, dim),
            "ffn.fc1.weight": (hidden, dim),
            "ffn.fc2.weight": (dim, hidden),
            "pos_embedding.embedding.weight": (config.num_buckets, config.num_heads),
        }
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (dim,)}


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _residual(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{name}.residual.0.gamma": (inputs, 1, 1, 1),
        f"{name}.residual.3.gamma": (outputs, 1, 1, 1),
    }
    shapes |= _conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3) | _conv(
        f"{name}.residual.6", outputs, outputs, 3, 3, 3
    )
    return (
        shapes
        if inputs == outputs
        else shapes | _conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1)
    )


def _middle(name: str, dim: int) -> dict[str, Shape]:
    attention: dict[str, Shape] = {f"{name}.1.norm.gamma": (dim, 1, 1)}
    attention |= _conv(f"{name}.1.to_qkv", 3 * dim, dim, 1, 1) | _conv(
        f"{name}.1.proj", dim, dim, 1, 1
    )
    return _residual(f"{name}.0", dim, dim) | attention | _residual(f"{name}.2", dim, dim)


def _encoder_layers(config: VAEConfig) -> Iterator[dict[str, Shape]]:
    """`encoder.downsamples` in order; each level but the last ends with a downsampling layer."""
    dim, index = config.base_dim, 0
    for level, factor in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            yield _residual(f"encoder.downsamples.{index}", dim, config.base_dim * factor)
            dim, index = config.base_dim * factor, index + 1
        if level + 1 < len(config.dim_mult):
            name = f"encoder.downsamples.{index}"
            temporal = (
                _conv(f"{name}.time_conv", dim, dim, 3, 1, 1)
                if config.temporal_downsample[level]
                else {}
            )
            yield _conv(f"{name}.resample.1", dim, dim, 3, 3) | temporal
            index += 1


def _decoder_layers(config: VAEConfig) -> Iterator[dict[str, Shape]]:
    """`decoder.upsamples` in order; each level but the last ends with an upsampling layer.

    Each level has one residual block more than the encoder's; upsampling halves the channels.
    """
    dim, index = config.base_dim * config.dim_mult[-1], 0
    for level, factor in enumerate(reversed(config.dim_mult)):
        for _ in range(config.num_res_blocks + 1):
            yield _residual(f"decoder.upsamples.{index}", dim, config.base_dim * factor)
            dim, index = config.base_dim * factor, index + 1
        if level + 1 < len(config.dim_mult):
            name = f"decoder.upsamples.{index}"
            temporal = (
                _conv(f"{name}.time_conv", 2 * dim, dim, 3, 1, 1)
                if config.temporal_downsample[-1 - level]
                else {}
            )
            yield _conv(f"{name}.resample.1", dim // 2, dim, 3, 3) | temporal
            dim, index = dim // 2, index + 1


def vae_shapes(config: VAEConfig) -> dict[str, Shape]:
    """Shapes of all tensors of the Wan2.1 VAE, by official name: 194 for A14B's config."""
    first, last, z = config.base_dim, config.base_dim * config.dim_mult[-1], config.z_dim
    shapes = _conv("encoder.conv1", first, 3, 3, 3, 3)
    for layer in _encoder_layers(config):
        shapes |= layer
    shapes |= (
        _middle("encoder.middle", last)
        | {"encoder.head.0.gamma": (last, 1, 1, 1)}
        | _conv("encoder.head.2", 2 * z, last, 3, 3, 3)
    )
    shapes |= _conv("conv1", 2 * z, 2 * z, 1, 1, 1) | _conv("conv2", z, z, 1, 1, 1)
    shapes |= _conv("decoder.conv1", last, z, 3, 3, 3) | _middle("decoder.middle", last)
    for layer in _decoder_layers(config):
        shapes |= layer
    final = config.base_dim * config.dim_mult[0]
    return (
        shapes
        | {"decoder.head.0.gamma": (final, 1, 1, 1)}
        | _conv("decoder.head.2", 3, final, 3, 3, 3)
    )
