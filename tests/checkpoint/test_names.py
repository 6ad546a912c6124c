"""The name maps and shapes agree with the classes of diffusers and transformers, at the real
sizes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowvram.checkpoint import names
from lowvram.variants import T2V_A14B, DiTConfig, TextEncoderConfig, VAEConfig
from tests.helpers.checkpoints import (
    diffusers_dit_config,
    diffusers_vae_config,
    tiny_config,
    transformers_text_config,
)

DEMO_VAE = VAEConfig(base_dim=16, dim_mult=(1, 2, 3, 3), num_res_blocks=1)
OTHER_VAE = VAEConfig(
    base_dim=8, dim_mult=(1, 3, 2), num_res_blocks=3, temporal_downsample=(True, False)
)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def reference_dit(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    from diffusers import WanTransformer3DModel

    settings = {
        key: value
        for key, value in diffusers_dit_config(config).items()
        if key not in ("_class_name", "text_len")
    }
    with torch.device("meta"):
        return shapes_of(WanTransformer3DModel(**settings))


def reference_text(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    from transformers import UMT5Config, UMT5EncoderModel

    settings: dict[str, Any] = transformers_text_config(config)
    with torch.device("meta"):
        shapes = shapes_of(UMT5EncoderModel(UMT5Config(**settings)))
    shapes.pop("encoder.embed_tokens.weight", None)  # the same tensor as `shared`
    return shapes


def reference_vae(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    from diffusers import AutoencoderKLWan

    settings = {
        key: value for key, value in diffusers_vae_config(config).items() if key != "_class_name"
    }
    with torch.device("meta"):
        return shapes_of(AutoencoderKLWan(**settings))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(T2V_A14B.dit, 1095, marks=pytest.mark.slow, id="A14B"),
        pytest.param(tiny_config().dit, 69, id="tiny"),
    ],
)
def test_dit_names_and_shapes_are_those_of_diffusers(config: DiTConfig, count: int) -> None:
    ours = names.dit_shapes(config)
    assert len(ours) == count
    assert {
        names.diffusers_dit_from_official(name): shape for name, shape in ours.items()
    } == reference_dit(config)


@pytest.mark.parametrize(
    ("config", "count"),
    [(T2V_A14B.text_encoder, 242), (tiny_config().text_encoder, 22)],
    ids=["UMT5-XXL", "tiny"],
)
def test_text_encoder_names_and_shapes_are_those_of_transformers(
    config: TextEncoderConfig, count: int
) -> None:
    ours = names.text_encoder_shapes(config)
    assert len(ours) == count
    assert {
        names.transformers_text_from_official(name): shape for name, shape in ours.items()
    } == reference_text(config)


@pytest.mark.parametrize(
    ("config", "count"),
    [(T2V_A14B.vae, 194), (DEMO_VAE, None), (tiny_config().vae, None), (OTHER_VAE, None)],
    ids=["Wan2.1", "demo", "tiny", "3-levels"],
)
def test_vae_names_and_shapes_are_those_of_diffusers(config: VAEConfig, count: int | None) -> None:
    ours = names.vae_shapes(config)
    assert count is None or len(ours) == count
    assert {
        names.diffusers_vae_from_official(name, config): shape for name, shape in ours.items()
    } == reference_vae(config)


def test_every_map_is_undone_by_its_inverse() -> None:
    for name in names.dit_shapes(T2V_A14B.dit):
        assert (
            names.official_from_diffusers_dit(names.diffusers_dit_from_official(name) or "") == name
        )
    for name in names.text_encoder_shapes(T2V_A14B.text_encoder):
        assert (
            names.official_from_transformers_text(names.transformers_text_from_official(name) or "")
            == name
        )
    for config in (T2V_A14B.vae, DEMO_VAE, OTHER_VAE):
        for name in names.vae_shapes(config):
            assert (
                names.official_from_diffusers_vae(
                    names.diffusers_vae_from_official(name, config) or "", config
                )
                == name
            )


def test_official_norm3_is_the_second_norm_of_diffusers() -> None:
    assert names.diffusers_dit_from_official("blocks.7.norm3.bias") == "blocks.7.norm2.bias"
    assert names.official_from_diffusers_dit("blocks.7.norm3.bias") is None
    assert names.diffusers_dit_from_official("head.modulation") == "scale_shift_table"
    assert names.diffusers_dit_from_official("blocks.0.modulation") == "blocks.0.scale_shift_table"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "blocks",
        "blocks.0",
        "blocks.00.attn1.to_q.weight",
        "blocks.-1.attn1.to_q.weight",
        "blocks.0.attn1.to_q.weight_scale",
        "blocks.0.attn1.to_q.weight.comfy_quant",
        "scaled_fp8",
        "blocks.٣.attn1.to_q.weight",
        "decoder.up_blocks.0.resnets.9.norm1.gamma",
        "decoder.up_blocks.0.upsamplers.1.resample.1.bias",
        "decoder.down_blocks.0.norm1.gamma",
        "encoder.mid_block.resnets.7.norm1.gamma",
        "encoder.up_blocks.0.resnets.0.norm1.gamma",
        "encoder.block.0.layer.0.SelfAttention.x.weight",
    ],
)
def test_unknown_names_map_to_none(name: str) -> None:
    assert names.official_from_diffusers_dit(name) is None
    assert names.official_from_transformers_text(name) is None
    assert names.official_from_diffusers_vae(name, T2V_A14B.vae) is None


def test_tied_embedding_is_the_embedding() -> None:
    assert (
        names.official_from_transformers_text("encoder.embed_tokens.weight")
        == "token_embedding.weight"
    )
