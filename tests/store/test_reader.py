"""A store opens only when it is complete and exactly what its manifest says; blocks are single byte
ranges that are all alike.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowvram.checkpoint.readers.tensor_data import TORCH_DTYPES
from lowvram.errors import CheckpointError, IntegrityError, MissingTensorsError
from lowvram.formats import FORMATS
from lowvram.store.layout import StoredTensor, component_layout
from lowvram.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from lowvram.store.reader import StoreFile, open_store
from lowvram.store.writer import StoreWriter
from lowvram.variants import COMPONENTS, EXPERTS, T2V_A14B
from tests.helpers.checkpoints import tiny_config, tiny_weights, write_store

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("pristine") / "store", CONFIG, "int8-plain")


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "store")


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_store_of_every_format_opens_and_reads_as_safetensors_does(
    format: str, tmp_path: Path
) -> None:
    path = write_store(tmp_path / "store", CONFIG, format)
    with open_store(path) as store:
        assert (store.config, store.format) == (CONFIG, format)
        assert list(store.files) == list(COMPONENTS)
        for component in COMPONENTS:
            expected = load_file(path / f"{component}.safetensors")
            file = store.files[component]
            assert set(expected) == set(file.header.tensors)
            assert all(
                as_bytes(file.read(name)) == as_bytes(tensor) for name, tensor in expected.items()
            )
    assert sorted(item.name for item in path.iterdir()) == sorted(
        [f"{name}.safetensors" for name in COMPONENTS] + ["lowvram.json", "tokenizer.json"]
    )


def test_bytes_of_a_block_hold_its_tensors_at_their_offsets(pristine: Path) -> None:
    with open_store(pristine) as store:
        for component in (*EXPERTS, "text_encoder"):
            file = store.files[component]
            content = file.path.read_bytes()
            assert len(file.blocks) == 2
            for index, (start, nbytes) in enumerate(file.blocks):
                block = content[start : start + nbytes]
                assert (start - file.blocks[0].start) % 256 == 0
                for name, (dtype, shape, offset) in file.block_tensors.items():
                    tensor = file.read(f"blocks.{index}.{name}")
                    assert (tensor.dtype, tuple(tensor.shape)) == (TORCH_DTYPES[dtype], shape)
                    assert offset % 256 == 0
                    assert block[offset : offset + tensor.nbytes] == as_bytes(tensor)
            assert file.blocks[0].start + sum(block.nbytes for block in file.blocks) == len(content)
            assert not any(name.startswith("blocks.") for name in file.rest)
        vae = store.files["vae"]
        assert (vae.blocks, vae.block_tensors) == ([], {})
        assert set(vae.rest) == set(tiny_weights(CONFIG, "vae"))


def write_file(path: Path, tensors: list[StoredTensor]) -> Path:
    with StoreWriter(path, tensors, {}, {}, resume=False) as writer:
        for tensor in tensors:
            writer.write(torch.zeros(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype]))
        writer.finish()
    return path


def tensor(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, "F32", shape or (64,), "copy", name)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([tensor("blocks.0.a"), tensor("rest")], "'rest' is out of order"),
        ([tensor("blocks.1.a"), tensor("blocks.0.a")], "'blocks.1.a' is out of order"),
        ([tensor("blocks.0.a"), tensor("blocks.2.a")], "'blocks.2.a' is out of order"),
        (
            [tensor("blocks.0.a"), tensor("blocks.1.a"), tensor("blocks.0.b")],
            "'blocks.0.b' is out of order",
        ),
        (
            [tensor("blocks.0.a"), tensor("blocks.1.b")],
            "the layout of block 1 differs from block 0",
        ),
        (
            [tensor("blocks.0.a"), tensor("blocks.1.a", 65)],
            "the layout of block 1 differs from block 0",
        ),
        (
            [
                tensor("blocks.0.a"),
                tensor("blocks.0.b"),
                tensor("blocks.1.b"),
                tensor("blocks.1.a"),
            ],
            "the layout of block 1 differs from block 0",
        ),
        (
            [tensor("blocks.0.a"), tensor("blocks.0.b"), tensor("blocks.1.a")],
            "the layout of block 1 differs from block 0",
        ),
    ],
)
def test_file_that_is_not_block_contiguous_is_refused(
    tensors: list[StoredTensor], text: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=text):
        StoreFile(write_file(tmp_path / "x.safetensors", tensors))


def test_header_order_that_differs_from_data_order_is_refused(tmp_path: Path) -> None:
    text = b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(CheckpointError, match="the offset of tensor 'b' does not match"):
        StoreFile(tmp_path / "x.safetensors")


def test_tensors_that_differ_from_the_layout_are_named_in_all_files_at_once(store: Path) -> None:
    for component, edit in (("low_noise", "head.modulation"), ("vae", "conv2.bias")):
        layout = component_layout(component, CONFIG, "int8-plain")
        kept = [item for item in layout.tensors if item.name != edit]
        write_file(store / f"{component}.safetensors", [tensor("surplus"), *kept])
    with pytest.raises(MissingTensorsError) as caught:
        open_store(store)
    for text in (
        "low_noise.safetensors: 1 tensors are missing: 'head.modulation'",
        "1 tensors are missing: 'conv2.bias'",
        "'surplus'",
    ):
        assert text in str(caught.value)
    assert str(caught.value).endswith("quantize again or restore the files")


def test_order_that_differs_from_the_layout_is_refused(store: Path) -> None:
    tensors = list(component_layout("vae", CONFIG, "int8-plain").tensors)
    tensors[3], tensors[4] = tensors[4], tensors[3]
    write_file(store / "vae.safetensors", tensors)
    with pytest.raises(MissingTensorsError, match="2 tensors are in the wrong order"):
        open_store(store)


def test_p12_one_expert_in_the_place_of_both_does_not_open(store: Path) -> None:
    shutil.copy(store / "high_noise.safetensors", store / "low_noise.safetensors")
    with pytest.raises(IntegrityError) as caught:
        open_store(store)
    message = str(caught.value)
    told = (
        "low_noise.safetensors: head.modulation differs",
        "it is the tensor of high_noise",
        "quantize again",
        f"inspect {store} --verify",
    )
    for text in told:
        assert text in message
    assert "high_noise.safetensors:" not in message
    assert "\n" not in message


def test_p12_swapped_experts_do_not_open(store: Path) -> None:
    high, low = (store / f"{name}.safetensors" for name in EXPERTS)
    high.rename(store / "between")
    low.rename(high)
    (store / "between").rename(low)
    with pytest.raises(IntegrityError) as caught:
        open_store(store)
    for text in (
        f"{high}: head.modulation differs",
        "it is the tensor of low_noise",
        f"{low}: head.modulation differs",
        "it is the tensor of high_noise",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("component", COMPONENTS)
def test_p12_a_file_of_another_model_does_not_open(
    component: str, store: Path, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", CONFIG, "int8-plain", seed=1)
    shutil.copy(other / f"{component}.safetensors", store / f"{component}.safetensors")
    with pytest.raises(
        IntegrityError, match=rf"{component}\.safetensors: [a-z1.]+ differs .*quantize again"
    ):
        open_store(store)


def test_a_store_of_the_real_sizes_opens_without_reading_much(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []
    original = StoreFile.read

    def record(file: StoreFile, name: str) -> torch.Tensor:
        read.append((file.path.stem, name))
        return original(file, name)

    monkeypatch.setattr(StoreFile, "read", record)
    open_store(store).close()
    assert {component for component, _ in read} == set(COMPONENTS)
    sizes = {
        (name, tensor.name): tensor.nbytes
        for name in COMPONENTS
        for tensor in component_layout(name, T2V_A14B, "int8").tensors
    }
    assert sum(sizes[item] for item in read) < 128 * 1024


def test_expert_of_another_format_is_refused(store: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", CONFIG, "bf16")
    shutil.copy(other / "low_noise.safetensors", store / "low_noise.safetensors")
    with pytest.raises(
        MissingTensorsError,
        match=r"20 tensors have the wrong dtype or shape: 'blocks\.0\.self_attn\.q\.weight'",
    ):
        open_store(store)


@pytest.mark.parametrize(
    "name",
    [*(f"{component}.safetensors" for component in COMPONENTS), "tokenizer.json", "lowvram.json"],
)
def test_missing_file_is_named(name: str, store: Path) -> None:
    (store / name).unlink()
    with pytest.raises(
        CheckpointError, match=f"{name}.*(quantize again|lowvram quantize SOURCE MODEL)"
    ):
        open_store(store)


def test_a_source_in_place_of_a_store_is_told_to_be_quantized(tmp_path: Path) -> None:
    for name in ("high_noise_model", "transformer"):
        source = tmp_path / name
        (source / name).mkdir(parents=True)
        with pytest.raises(
            CheckpointError,
            match=rf"not quantized yet: quantize it with `lowvram quantize {source} MODEL`",
        ):
            open_store(source)


def test_a_manifest_that_is_not_json_says_what_to_do(store: Path) -> None:
    (store / MANIFEST_NAME).write_text("{")
    with pytest.raises(
        CheckpointError, match=r"lowvram\.json is not JSON.*quantize again or restore it"
    ):
        open_store(store)


def test_p02_unfinished_store_does_not_open(store: Path, tmp_path: Path) -> None:
    (store / MANIFEST_NAME).unlink()
    (store / "vae.safetensors").rename(store / "vae.safetensors.partial")
    with pytest.raises(
        CheckpointError, match="is unfinished: continue with lowvram quantize --resume"
    ):
        open_store(store)


def test_changed_tokenizer_is_refused(store: Path) -> None:
    (store / "tokenizer.json").write_bytes((store / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json differs"):
        open_store(store)


def test_manifest_reads_back_what_was_written(pristine: Path, tmp_path: Path) -> None:
    manifest = read_manifest(pristine)
    assert manifest.config == CONFIG
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST_NAME).read_bytes() == (pristine / MANIFEST_NAME).read_bytes()
    real = replace(manifest, config=T2V_A14B)
    real.write(tmp_path)
    assert read_manifest(tmp_path).config == T2V_A14B
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["variant"] == "t2v-a14b"


def forged(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and its own hash with it, as an attacker would."""
    data = json.loads((store / MANIFEST_NAME).read_text())
    del data["sha256"]
    change(data)
    data["sha256"] = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    (store / MANIFEST_NAME).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data.update(format_version=2), "format version 2"),
        (lambda data: data.update(format="int3"), "unknown format 'int3'"),
        (lambda data: data["components"].pop("vae"), "components are not"),
        (
            lambda data: data["components"]["vae"].update(file="../vae.safetensors"),
            "the file of vae is not",
        ),
        (
            lambda data: data["components"]["vae"].update(file="low_noise.safetensors"),
            "the file of vae is not",
        ),
        (
            lambda data: data["components"]["vae"].update(header_sha256="00"),
            "header_sha256: expected str matching",
        ),
        (lambda data: data["components"]["vae"].update(tensors=[]), "not a manifest"),
        (lambda data: data.pop("tokenizer_sha256"), "tokenizer_sha256"),
        (lambda data: data["config"]["dit"].update(num_layers=10**9), "expected int <= 1024"),
        (lambda data: data["config"]["dit"].update(dim="256"), "dim is '256', expected int"),
        (lambda data: data["config"]["dit"].update(dim=True), "dim is True, expected int"),
        (lambda data: data["config"]["dit"].update(num_heads=7), "does not split into 7 heads"),
        (
            lambda data: data["config"]["dit"].update(ffn_dim=100),
            "are incompatible|wrong dtype or shape",
        ),
        (lambda data: data["config"]["dit"].update(extra=1), "other keys"),
        (
            lambda data: data["config"]["vae"].update(dim_mult=[]),
            "dim_mult is \\[\\], expected array",
        ),
        (lambda data: data["config"]["vae"].update(temporal_downsample=[1]), "is 1, expected bool"),
        (lambda data: data["config"]["sampling"].update(shift=float("nan")), "shift is nan"),
        (lambda data: data.update(config=None), "not a manifest|other keys"),
        (lambda data: data.update(recipe=3), "not a manifest"),
        (
            lambda data: data["components"]["vae"]["tensors"].pop("conv1.bias"),
            "no hash in the manifest",
        ),
    ],
)
def test_forged_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], text: str, store: Path
) -> None:
    forged(store, change)
    with pytest.raises(CheckpointError, match=text):
        open_store(store)


def test_forging_without_a_change_opens(store: Path) -> None:
    forged(store, lambda data: None)
    assert isinstance(open_store(store).manifest, Manifest)


def test_p31_numbers_that_would_take_minutes_are_refused(store: Path) -> None:
    manifest = read_manifest(store)
    data = manifest.to_dict()
    data.pop("sha256")
    data["config"]["vae"]["num_res_blocks"] = 2**20
    text = json.dumps(data, sort_keys=True, ensure_ascii=True).encode()
    data["sha256"] = hashlib.sha256(text).hexdigest()
    (store / MANIFEST_NAME).write_text(json.dumps(data))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="num_res_blocks is 1048576"):
        open_store(store)
    assert time.monotonic() - began < 1
