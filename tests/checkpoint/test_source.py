"""Sources: both layouts give the same model; what does not fit is refused at once and by name
(promise 12).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram.checkpoint.layouts.parts import model_config
from lowvram.checkpoint.source import open_source
from lowvram.checkpoint.validate import QuantizedSourceError, WrongExpertError
from lowvram.errors import CheckpointError, MissingTensorsError
from lowvram.variants import (
    COMPONENTS,
    VARIANTS,
    ModelConfig,
    SamplingDefaults,
    VAEConfig,
    Variant,
)
from tests.helpers.checkpoints import (
    tiny_config,
    tiny_weights,
    write_diffusers,
    write_json,
    write_official,
)

CONFIG = tiny_config()
T5 = "models_t5_umt5-xxl-enc-bf16.safetensors"
VAE = "Wan2.1_VAE.safetensors"
HIGH = "high_noise_model/diffusion_pytorch_model.safetensors"
LOW = "low_noise_model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write_official(root / "official", CONFIG, shards=1)
    write_official(root / "sharded", CONFIG, shards=3)
    write_diffusers(root / "diffusers", CONFIG)
    return root


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the official layout with one file per expert."""
    return shutil.copytree(pristine / "official", tmp_path / "model")


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine / "sharded", tmp_path / "model")


@pytest.fixture
def diffusers(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine / "diffusers", tmp_path / "model")


def edit_tensors(
    path: Path,
    edit: Callable[[dict[str, torch.Tensor]], object],
    metadata: dict[str, str] | None = None,
) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.mark.parametrize("layout", ["official", "sharded", "diffusers"])
def test_layouts_give_the_same_config_names_and_weights(layout: str, pristine: Path) -> None:
    with open_source(pristine / layout) as source:
        assert source.layout == ("diffusers" if layout == "diffusers" else "official")
        assert source.config == CONFIG
        assert json.loads(source.tokenizer)["model"]["type"] == "Unigram"
        for component in COMPONENTS:
            weights = tiny_weights(CONFIG, component)
            found = source.components[component]
            assert set(found.tensors) == set(weights)
            for name, tensor in weights.items():
                assert found.tensors[name].name == name
                assert found.tensors[name].shape == tuple(tensor.shape)
                assert torch.equal(found.read(name), tensor)


def test_sizes_of_the_demo_model_are_inferred(tmp_path: Path) -> None:
    vae = VAEConfig(base_dim=16, dim_mult=(1, 2, 3, 3), num_res_blocks=1)
    text = replace(CONFIG.text_encoder, num_layers=1)
    sampling = SamplingDefaults(
        width=64,
        height=48,
        num_frames=17,
        fps=8,
        steps=12,
        shift=3.5,
        guidance_high=2.0,
        guidance_low=1.5,
    )
    config = ModelConfig("t2v-custom", CONFIG.dit, text, vae, sampling)
    write_official(tmp_path, config, shards=1)
    with open_source(tmp_path) as source:
        assert source.config == config


def test_boundary_of_diffusers_is_read(diffusers: Path) -> None:
    edit_json(diffusers / "model_index.json", boundary_ratio=0.9)
    with open_source(diffusers) as source:
        assert source.config.sampling == SamplingDefaults(boundary=0.9)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_recognised_by_its_dimensions(variant: Variant, tmp_path: Path) -> None:
    config = variant.config
    found = model_config(tmp_path, config.dit, config.text_encoder, config.vae)
    assert found == config
    custom = model_config(
        tmp_path, config.dit, replace(config.text_encoder, num_layers=2), config.vae
    )
    assert custom.variant == "t2v-custom"


def test_fingerprint_changes_with_the_file_and_only_then(model: Path) -> None:
    def prints() -> list[str]:
        with open_source(model) as source:
            return [source.components[component].fingerprint() for component in COMPONENTS]

    before = prints()
    assert prints() == before
    assert len(set(before)) == 4
    os.utime(model / VAE, ns=(1, 1))
    after = prints()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, True, False]


def test_tied_embedding_may_be_stored_twice(diffusers: Path) -> None:
    path = diffusers / "text_encoder"
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["shared.weight"]
    edit_tensors(
        path / shard,
        lambda tensors: tensors.update(
            {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
        ),
    )
    index["weight_map"]["encoder.embed_tokens.weight"] = shard
    write_json(path / "model.safetensors.index.json", index)
    with open_source(diffusers) as source:
        assert len(source.components["text_encoder"].tensors) == 22


def test_p12_missing_extra_and_wrong_shape_are_named_all_at_once(model: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blocks.1.ffn.2.bias"], tensors["head.modulation"]
        tensors["blocks.2.ffn.2.bias"] = torch.ones(256)
        tensors["blocks.0.norm3.weight"] = torch.ones(255)

    edit_tensors(model / LOW, spoil)
    edit_tensors(model / VAE, lambda tensors: tensors.pop("decoder.head.2.bias"))
    with pytest.raises(MissingTensorsError) as caught:
        open_source(model)
    message = str(caught.value)
    for text in (
        "low_noise",
        "2 of 69 tensors are missing",
        "'blocks.1.ffn.2.bias'",
        "'head.modulation'",
        "'blocks.2.ffn.2.bias'",
    ):
        assert text in message
    for text in ("blocks.0.norm3.weight is [255], expected [256]", "vae", "'decoder.head.2.bias'"):
        assert text in message
    assert "download it again, or give the folder with the matching config.json" in message
    assert "high_noise" not in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["token_embedding.weight", "blocks.0.attn.q.weight"])
def test_p12_tensor_that_tells_the_size_is_missing(name: str, model: Path) -> None:
    edit_tensors(model / T5, lambda tensors: tensors.pop(name))
    with pytest.raises(MissingTensorsError, match=name.replace(".", r"\.")):
        open_source(model)


def test_p12_swapped_component_is_named(model: Path) -> None:
    (model / VAE).unlink()
    (model / T5).rename(model / VAE)
    shutil.copy(model / VAE, model / T5)
    with pytest.raises(MissingTensorsError, match=r"encoder\.conv1\.weight"):
        open_source(model)


@pytest.mark.parametrize(
    "scale",
    [
        "blocks.0.self_attn.q.scale_weight",
        "blocks.0.self_attn.q.weight_scale",
        "scaled_fp8",
        "blocks.0.ffn.0.comfy_quant",
    ],
)
def test_p12_unconsumed_scale_is_an_error_of_its_own(scale: str, model: Path) -> None:
    edit_tensors(model / HIGH, lambda tensors: tensors.update({scale: torch.ones(())}))
    with pytest.raises(QuantizedSourceError, match=f"dialect that is not supported.*{scale}"):
        open_source(model)


def test_p12_unconsumed_scale_under_diffusers_names(diffusers: Path) -> None:
    path = diffusers / "vae" / "diffusion_pytorch_model.safetensors"
    edit_tensors(
        path, lambda tensors: tensors.update({"decoder.conv_in.weight_scale": torch.ones(())})
    )
    with pytest.raises(QuantizedSourceError, match=r"decoder\.conv_in\.weight_scale"):
        open_source(diffusers)


def test_p12_eight_bit_weights_without_scales_are_refused(model: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    edit_tensors(
        model / HIGH, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})
    )
    with pytest.raises(QuantizedSourceError, match=f"F8_E4M3.*{name}"):
        open_source(model)


def test_p12_expert_in_the_other_place_is_noticed_by_file_name(model: Path) -> None:
    (model / HIGH).rename((model / HIGH).with_name("wan2.2_t2v_low_noise_14B.safetensors"))
    with pytest.raises(WrongExpertError, match=r"high_noise is expected here.*low_noise_14B"):
        open_source(model)


def test_p12_expert_in_the_other_place_is_noticed_by_metadata(model: Path) -> None:
    edit_tensors(model / LOW, lambda tensors: None, metadata={"title": "Wan2.2 HighNoise expert"})
    with pytest.raises(WrongExpertError, match="low_noise is expected here"):
        open_source(model)


def test_p12_expert_with_the_right_name_passes(model: Path) -> None:
    (model / LOW).rename((model / LOW).with_name("wan2.2_t2v_low_noise_14B.safetensors"))
    open_source(model).close()


def test_p12_one_file_for_both_experts_is_refused(model: Path) -> None:
    (model / LOW).unlink()
    (model / LOW).symlink_to(model / HIGH)
    with pytest.raises(WrongExpertError, match="the same files"):
        open_source(model)


def test_missing_shard_is_named_with_its_index(sharded: Path) -> None:
    (sharded / "low_noise_model" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"1 of the 3 shards that diffusion_pytorch_model\.safetensors\.index\.json names: "
        r"'.*-00002-of-00003",
    ):
        open_source(sharded)


def test_truncated_shard_is_named_with_its_bytes(sharded: Path) -> None:
    path = sharded / "low_noise_model" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 5)
    with pytest.raises(CheckpointError, match=rf"{path}: expected {size} bytes, found {size - 5}"):
        open_source(sharded)


def test_index_and_shards_that_disagree_are_refused(sharded: Path) -> None:
    index = sharded / "low_noise_model" / "diffusion_pytorch_model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["head.modulation"] = "diffusion_pytorch_model-00001-of-00003.safetensors"
    write_json(index, data)
    with pytest.raises(
        MissingTensorsError, match=r"1 tensors are not in the shard.*'head\.modulation'"
    ):
        open_source(sharded)


def test_stray_file_beside_the_shards_is_refused(sharded: Path) -> None:
    folder = sharded / "low_noise_model"
    shutil.copy(
        folder / "diffusion_pytorch_model-00001-of-00003.safetensors", folder / "old.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"old\.safetensors"):
        open_source(sharded)


def test_shards_without_index_are_refused(sharded: Path) -> None:
    (sharded / "high_noise_model" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"contains 3 \.safetensors files and no"):
        open_source(sharded)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dim": "256"}, "dim is '256'"),
        ({"dim": True}, "dim is True"),
        ({"dim": 0}, "dim is 0"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, expected int <= 1024"),
        ({"num_heads": 3}, "does not split into 3 heads"),
        ({"model_type": "i2v"}, "model_type is 'i2v'"),
        ({"eps": None}, "eps is None, expected float"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"num_layers": 3}, "differ"),
    ],
)
def test_wrong_settings_are_refused_with_file_and_key(
    change: dict[str, object], text: str, model: Path
) -> None:
    edit_json(model / "high_noise_model" / "config.json", **change)
    with pytest.raises(CheckpointError, match=text):
        open_source(model)


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("transformer/config.json", {"image_dim": 1280}, "image_dim is 1280"),
        ("vae/config.json", {"is_residual": True}, "is_residual is True"),
        ("vae/config.json", {"temperal_downsample": [True]}, "temperal_downsample"),
        ("vae/config.json", {"z_dim": 48}, "VAE has 48"),
        ("text_encoder/config.json", {"d_model": 512}, "text features of width 256"),
        ("model_index.json", {"boundary_ratio": 2}, "boundary_ratio"),
    ],
)
def test_wrong_settings_of_diffusers_are_refused(
    file: str, change: dict[str, object], text: str, diffusers: Path
) -> None:
    edit_json(diffusers / file, **change)
    with pytest.raises(CheckpointError, match=text):
        open_source(diffusers)


def test_unknown_sampling_default_is_refused(model: Path) -> None:
    write_json(model / "lowvram_defaults.json", {"step": 5})
    with pytest.raises(CheckpointError, match="unknown key 'step'"):
        open_source(model)


@pytest.mark.parametrize(
    "content", ["{", "[]", "\udcff", "[" * 100_000], ids=["cut", "list", "not utf-8", "deep"]
)
def test_broken_json_is_refused(content: str, model: Path) -> None:
    path = model / "high_noise_model" / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"is not .*download it again"):
        open_source(model)


def test_wrong_folders_are_refused_with_what_was_looked_for(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CheckpointError, match="neither high_noise_model/"):
        open_source(tmp_path / "model" / "google")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_source(model / VAE)
    (model / "transformer").mkdir()
    with pytest.raises(CheckpointError, match="mixes"):
        open_source(model)
    (model / "lowvram.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a quantized store"):
        open_source(model)


@pytest.mark.parametrize(
    "name",
    [VAE, "google/umt5-xxl/tokenizer.json", "low_noise_model/config.json", "low_noise_model"],
)
def test_missing_part_is_named(name: str, model: Path) -> None:
    path = model / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=f"{name.split('.')[0]}.*download it"):
        open_source(model)


def test_a_missing_folder_is_named_instead_of_a_file_in_it(model: Path) -> None:
    shutil.rmtree(model / "low_noise_model")
    with pytest.raises(
        CheckpointError, match=r"the folder \S+/low_noise_model is missing: download it again"
    ):
        open_source(model)
