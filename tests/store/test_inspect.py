"""`inspect` describes what people have on disk; `--verify` finds any flipped byte and names its
tensor (promise 3).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram.checkpoint.readers.safetensors_header import read_header
from lowvram.cli.report_tables import inspect_table
from lowvram.errors import CheckpointError, IntegrityError, UsageError
from lowvram.store.inspect import inspect_path
from lowvram.store.manifest import read_manifest
from lowvram.variants import COMPONENTS
from tests.helpers.checkpoints import (
    tiny_config,
    tiny_weights,
    write_diffusers,
    write_official,
    write_store,
)

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("pristine") / "store", CONFIG, "int8")


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "store")


def flip(path: Path, position: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def test_p03_every_tensor_has_its_hash_in_the_manifest(pristine: Path) -> None:
    manifest = read_manifest(pristine)
    for component in COMPONENTS:
        path = pristine / f"{component}.safetensors"
        content, header = path.read_bytes(), read_header(path)
        expected = {
            name: hashlib.sha256(content[info.start : info.end]).hexdigest()
            for name, info in header.tensors.items()
        }
        assert manifest.components[component].tensors == expected


def test_p03_sound_store_passes(pristine: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = inspect_path(
        pristine, verify=True, progress=lambda done, total: seen.append((done, total))
    )
    assert found["verified"] is True
    assert seen == sorted(seen)
    assert seen[-1] == (found["total_bytes"], found["total_bytes"])


def test_p03_single_flipped_byte_of_data_is_found_and_named(store: Path) -> None:
    chance = random.Random(3)
    for _ in range(25):
        component = chance.choice(COMPONENTS)
        path = store / f"{component}.safetensors"
        header = read_header(path)
        position, mask = (
            chance.randrange(header.data_start, header.file_bytes),
            chance.randrange(1, 256),
        )
        name = next(
            info.name for info in header.tensors.values() if info.start <= position < info.end
        )
        flip(path, position, mask)
        with pytest.raises(IntegrityError, match="1 parts differ") as caught:
            inspect_path(store, verify=True)
        assert f"'{component} {name}'" in str(caught.value)
        flip(path, position, mask)
    inspect_path(store, verify=True)


def test_p03_single_flipped_byte_of_a_header_is_found(store: Path) -> None:
    chance = random.Random(4)
    for _ in range(25):
        path = store / f"{chance.choice(COMPONENTS)}.safetensors"
        position, mask = chance.randrange(read_header(path).data_start), chance.randrange(1, 256)
        flip(path, position, mask)
        with pytest.raises(CheckpointError):
            inspect_path(store, verify=True)
        flip(path, position, mask)
    path = store / "vae.safetensors"
    flip(path, read_header(path).data_start - 1, ord(" ") ^ ord("\t"))  # JSON does not care
    with pytest.raises(IntegrityError, match="'vae header'"):
        inspect_path(store, verify=True)


def test_p03_single_flipped_byte_of_the_manifest_is_found_or_means_nothing(store: Path) -> None:
    chance, path = random.Random(5), store / "lowvram.json"
    content = json.loads(path.read_text())
    for _ in range(60):
        position, mask = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        flip(path, position, mask)
        try:
            inspect_path(store, verify=False)
            assert json.loads(path.read_text()) == content, "only white space may differ"
        except CheckpointError as error:
            assert "lowvram.json" in str(error)  # noqa: PT017  (either outcome is right)
        flip(path, position, mask)


def test_p03_all_damaged_tensors_are_named_at_once(store: Path) -> None:
    names = ["blocks.0.ffn.0.weight", "blocks.1.norm3.bias", "head.head.bias"]
    header = read_header(store / "low_noise.safetensors")
    for name in names:
        flip(header.path, header.tensors[name].start, 1)
    with pytest.raises(IntegrityError, match="3 parts differ") as caught:
        inspect_path(store, verify=True)
    assert all(f"'low_noise {name}'" in str(caught.value) for name in names)


def test_p03_scale_that_is_not_finite_is_named(store: Path) -> None:
    name = "blocks.1.ffn.2.weight_scale"
    header = read_header(store / "high_noise.safetensors")
    with open(header.path, "r+b") as file:
        file.seek(header.tensors[name].start)
        file.write(torch.tensor([float("inf")]).numpy().tobytes())
    content = header.path.read_bytes()[header.tensors[name].start : header.tensors[name].end]
    manifest = read_manifest(store)
    record = manifest.components["high_noise"]
    tensors = record.tensors | {name: hashlib.sha256(content).hexdigest()}
    replace(
        manifest, components=manifest.components | {"high_noise": replace(record, tensors=tensors)}
    ).write(store)
    with pytest.raises(IntegrityError, match=rf"high_noise {name} \(not finite\)"):
        inspect_path(store, verify=True)


def test_store_is_described(pristine: Path) -> None:
    found = json.loads(json.dumps(inspect_path(pristine, verify=False)))
    assert (found["kind"], found["format"], found["verified"], found["config"]["variant"]) == (
        "store",
        "int8",
        False,
        "t2v-custom",
    )
    expert = found["components"]["low_noise"]
    assert (expert["blocks"], expert["dtypes"]["I8"]["tensors"], expert["file"]) == (
        2,
        20,
        "low_noise.safetensors",
    )
    assert expert["bytes"] == sum(item["bytes"] for item in expert["dtypes"].values())


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_source_is_described(layout: str, tmp_path: Path) -> None:
    (write_official if layout == "official" else write_diffusers)(tmp_path, CONFIG)
    found = json.loads(json.dumps(inspect_path(tmp_path, verify=False)))
    assert (found["kind"], found["layout"], found["config"]["dit"]["dim"]) == (
        "source",
        layout,
        256,
    )
    assert found["components"]["high_noise"]["dtypes"] == {"F32": {"tensors": 69, "bytes": 9104640}}
    assert len(found["components"]["high_noise"]["files"]) == 2


def test_pickles_of_a_source_are_listed_and_not_opened(tmp_path: Path) -> None:
    write_official(tmp_path, CONFIG, pickle=True)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"never opened")
    found = inspect_path(tmp_path, verify=False)
    assert found["components"]["vae"] == {
        "files": ["Wan2.1_VAE.pth"],
        "bytes": 12,
        "note": "a pickle, not opened",
    }
    assert found["components"]["low_noise"]["tensors"] == 69
    with pytest.raises(CheckpointError, match="pickle"):
        inspect_path(tmp_path / "Wan2.1_VAE.pth", verify=False)


@pytest.mark.parametrize(
    ("names", "metadata", "component", "dialect"),
    [
        (list(tiny_weights(CONFIG, "high_noise")), {}, "expert", "official"),
        (["blocks.0.attn1.to_q.weight"], {}, "expert", "plain"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], {}, "text_encoder", "official"),
        (["shared.weight"], {}, "text_encoder", "plain"),
        (["decoder.conv1.weight"], {}, "vae", "official"),
        (
            ["patch_embedding.weight", "scaled_fp8", "head.head.scale_weight"],
            {},
            "expert",
            "comfy scaled_fp8",
        ),
        (["patch_embedding.weight", "head.head.comfy_quant"], {}, "expert", "comfy_quant"),
        (["patch_embedding.weight"], {"_quantization_metadata": "{}"}, "expert", "comfy_quant"),
        (
            ["patch_embedding.weight", "head.head.weight_scale"],
            {},
            "expert",
            "weight_scale without markers",
        ),
        (
            ["patch_embedding.weight", "head.head.weight._data"],
            {"quantization_format": "quanto"},
            "expert",
            "quanto",
        ),
        (["patch_embedding.weight", "head.head.weight.absmax"], {}, "expert", "quantized, unknown"),
        (["diffusion_model.blocks.0.self_attn.q.lora_down.weight"], {}, "lora", "plain"),
        (["something.else"], {}, "unknown", "plain"),
    ],
)
def test_single_file_is_described(
    names: list[str], metadata: dict[str, str], component: str, dialect: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2) for name in names}, path, metadata=metadata)
    found = inspect_path(path, verify=False)
    assert (found["component"], found["dialect"], found["tensors"]) == (
        component,
        dialect,
        len(names),
    )
    assert found["metadata"] == metadata


def test_p03_verify_names_all_where_one_expert_lies_in_the_place_of_both(store: Path) -> None:
    shutil.copy(store / "high_noise.safetensors", store / "low_noise.safetensors")
    with pytest.raises(IntegrityError, match=r"head\.modulation differs.*--verify"):
        inspect_path(store, verify=False)
    with pytest.raises(IntegrityError, match=r"store: \d\d parts differ") as caught:
        inspect_path(store, verify=True)
    assert "low_noise" in str(caught.value)
    assert "'high_noise" not in str(caught.value)


@pytest.mark.parametrize("verify", [False, True])
def test_a_path_that_does_not_exist_is_told(verify: bool, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"none does not exist: give a \.safetensors file, a checkpoint folder or a "
        r"quantized model",
    ):
        inspect_path(tmp_path / "none", verify)


def test_verify_needs_hashes(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="no hashes to verify"):
        inspect_path(tmp_path / "x.safetensors", verify=True)


def test_a_lora_says_what_it_changes(tmp_path: Path) -> None:
    tensors = {}
    for module in ("blocks.3.ffn.0", "blocks.39.self_attn.q"):
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.zeros(8, 4)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.zeros(4, 8)
    tensors["diffusion_model.blocks.0.diff_m"] = torch.zeros(2)
    tensors["diffusion_model.blocks.40.diff_m"] = torch.zeros(2)
    save_file(tensors, tmp_path / "style.safetensors")
    report = inspect_path(tmp_path / "style.safetensors", False)
    assert report["component"] == "lora"
    assert report["lora"] == {
        "tensors_changed": 3,
        "kinds": ["LoRA", "difference"],
        "ranks": [8],
        "unknown_keys": 1,
        "unknown": ["'diffusion_model.blocks.40.diff_m'"],
    }
    caption = str(inspect_table(report).caption)
    assert caption.startswith("changes 3 tensors of a T2V-A14B expert (LoRA, difference; rank 8)")
    assert "1 keys are of none: 'diffusion_model.blocks.40.diff_m'" in caption
