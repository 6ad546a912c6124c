"""Promise 14: no name and no link in a model folder leads out of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lowvram.checkpoint.readers.files import check_plain_name
from lowvram.checkpoint.source import open_source
from lowvram.errors import CheckpointError, UnsafeFileError
from lowvram.store.reader import open_store
from tests.helpers.checkpoints import tiny_config, write_json, write_official, write_store

CONFIG = tiny_config()
VAE = "Wan2.1_VAE.safetensors"
INDEX = "high_noise_model/diffusion_pytorch_model.safetensors.index.json"
EVIL = [
    "../x.safetensors",
    "a/../../x.safetensors",
    "/etc/passwd",
    "//server/share/x.safetensors",
    "\\\\server\\share\\x",
    "C:\\x",
    "C:x",
    "..\\x",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "x\x00.safetensors",
    "x\n.safetensors",
    "x:stream",
    "x\u202e.safetensors",
    "x ",
    "x.",
    "a" * 256,
    "~/x|y",
    "\ud800",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_official(tmp_path / "model", CONFIG)


@pytest.mark.parametrize("name", EVIL)
def test_p14_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        check_plain_name(name, Path("index.json"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "a.safetensors",
        "diffusion_pytorch_model-00001-of-00006.safetensors",
        "..a",
        "模型.safetensors",
    ],
)
def test_p14_plain_name_passes(name: str) -> None:
    assert check_plain_name(name, Path("index.json")) == name


@pytest.mark.parametrize("name", ["../outside.safetensors", "{outside}", "..\\outside.safetensors"])
def test_p14_index_cannot_name_a_shard_outside(name: str, model: Path, tmp_path: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    shard = next(iter(index["weight_map"].values()))
    outside = model / "outside.safetensors"
    shutil.copy(model / "high_noise_model" / shard, outside)
    evil = name.format(outside=outside)
    index["weight_map"] = {
        key: evil if value == shard else value for key, value in index["weight_map"].items()
    }
    write_json(model / INDEX, index)
    (model / "high_noise_model" / shard).unlink()
    with pytest.raises(UnsafeFileError, match="not a plain file name"):
        open_source(model)


@pytest.mark.parametrize(
    "name",
    [
        VAE,
        "google/umt5-xxl/tokenizer.json",
        "low_noise_model/config.json",
        "low_noise_model",
        INDEX,
    ],
)
def test_p14_link_out_of_the_folder_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    path, outside = model / name, tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(UnsafeFileError, match="is a link out of its model folder"):
        open_source(model)


def test_p14_link_inside_the_folder_passes(model: Path) -> None:
    (model / VAE).rename(model / "real.safetensors")
    (model / VAE).symlink_to("real.safetensors")
    open_source(model).close()


def test_p14_model_folder_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    open_source(tmp_path / "link").close()


def as_hub_cache(model: Path, cache: Path) -> Path:
    """Moves every file into `blobs`, with relative links from `snapshots/<revision>`, as
    huggingface_hub does.
    """
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(item for item in model.rglob("*") if item.is_file())):
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(cache / "blobs" / str(number))
        link.symlink_to(os.path.relpath(cache / "blobs" / str(number), link.parent))
    return snapshot


def test_p14_hub_cache_passes_and_only_its_own_blobs(model: Path, tmp_path: Path) -> None:
    snapshot = as_hub_cache(model, tmp_path / "models--x--y")
    open_source(snapshot).close()
    other = tmp_path / "models--evil" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(snapshot / VAE, other / "file")
    (snapshot / VAE).unlink()
    (snapshot / VAE).symlink_to(other / "file")
    with pytest.raises(UnsafeFileError, match="is a link out of its model folder"):
        open_source(snapshot)


@pytest.mark.parametrize("place", ["blobs", "../blobs"])
def test_p14_blobs_beside_a_plain_folder_are_outside(place: str, tmp_path: Path) -> None:
    model = write_official(tmp_path / "parent" / "model", CONFIG)
    blobs = tmp_path / "parent" / place
    blobs.mkdir()
    (model / VAE).rename(blobs / "file")
    (model / VAE).symlink_to(blobs / "file")
    with pytest.raises(UnsafeFileError, match="is a link out of its model folder"):
        open_source(model)


def test_p14_circular_link_is_refused(model: Path) -> None:
    (model / VAE).unlink()
    (model / VAE).symlink_to(VAE)
    with pytest.raises(CheckpointError):
        open_source(model)


def test_p14_store_file_that_links_outside_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", CONFIG)
    (store / "vae.safetensors").rename(tmp_path / "outside")
    (store / "vae.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeFileError, match="is a link out of its model folder"):
        open_store(store)
