"""Checkpoints as people have them: LFS pointers, hub caches, copies by macOS, odd metadata."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from lowvram_quantize.convert import quantize

from lowvram.checkpoint.source import open_source
from lowvram.checkpoint.validate import WrongExpertError
from lowvram.errors import CheckpointError, LowvramError
from lowvram.store.inspect import inspect_path
from tests.helpers.checkpoints import tiny_config, write_official

POINTER = (
    f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9999999\n"
).encode()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_official(tmp_path / "source", tiny_config())
    return tmp_path / "source"


def shard(model: Path, expert: str = "high_noise_model") -> Path:
    return next((model / expert).glob("*.safetensors"))


def set_metadata(path: Path, metadata: object) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    "name",
    [
        "Wan2.1_VAE.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "high_noise_model/config.json",
        "low_noise_model/diffusion_pytorch_model.safetensors.index.json",
        "google/umt5-xxl/tokenizer.json",
    ],
)
def test_an_lfs_pointer_is_named_as_one(name: str, model: Path) -> None:
    (model / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        open_source(model)


def test_a_pickle_that_is_an_lfs_pointer_is_named_as_one(model: Path) -> None:
    (model / "Wan2.1_VAE.safetensors").unlink()
    (model / "Wan2.1_VAE.pth").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_source(model, allow_pickle=True)


def test_metadata_may_be_null(model: Path) -> None:
    set_metadata(shard(model), None)
    open_source(model).close()


@pytest.mark.parametrize("key", ["comment", "workflow"])
def test_p33_prose_about_the_other_expert_is_a_hint(
    key: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_metadata(shard(model), {key: "then hand over to the low noise model"})
    with caplog.at_level(logging.WARNING):
        open_source(model).close()
    assert "not swapped" in caplog.text


def test_files_of_macos_are_no_shards(model: Path) -> None:
    file = shard(model)
    file.with_name("._" + file.name).write_bytes(b"attributes")
    index = next(file.parent.glob("*.index.json"))
    index.with_name("._" + index.name).write_bytes(b"attributes")
    open_source(model).close()


def test_p12_equal_experts_are_refused_wherever_their_files_lie(
    model: Path, tmp_path: Path
) -> None:
    shutil.rmtree(model / "low_noise_model")
    shutil.copytree(model / "high_noise_model", model / "low_noise_model")
    with pytest.raises(WrongExpertError, match="the same weights"):
        quantize(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def hub_cache(model: Path, revisions: list[str], main: str | None) -> Path:
    root = model.parent / "models--Wan-AI--Wan2.2-T2V-A14B"
    (root / "refs").mkdir(parents=True)
    for revision in revisions:
        shutil.copytree(model, root / "snapshots" / revision)
    if main:
        (root / "refs" / "main").write_text(main)
    return root


@pytest.mark.parametrize(
    ("revisions", "main"), [(["abc"], None), (["abc"], "gone"), (["abc", "def"], "abc")]
)
def test_the_folder_of_a_hub_cache_is_its_snapshot(
    revisions: list[str], main: str | None, model: Path
) -> None:
    root = hub_cache(model, revisions, main)
    with open_source(root) as source:
        assert source.path == root / "snapshots" / "abc"
    inspect_path(root, verify=False)


def test_p33_several_snapshots_are_asked_about(model: Path) -> None:
    root = hub_cache(model, ["abc", "def"], None)
    with pytest.raises(CheckpointError, match="2 snapshots: give one of them") as refusal:
        open_source(root)
    open_source(Path(str(refusal.value).rsplit("such as ", 1)[1])).close()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_in_a_circle_are_errors(model: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for source, target in ((loop, tmp_path / "new"), (model, loop)):
        with pytest.raises(LowvramError) as refusal:
            quantize(source, target)
        assert str(loop) in str(refusal.value)
    (model / "lowvram_defaults.json").symlink_to("lowvram_defaults.json")
    with pytest.raises(CheckpointError, match=r"lowvram_defaults\.json"):
        open_source(model)


def test_files_without_numbers_are_told_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.stat

    def unnumbered(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = list(real(self, follow_symlinks=follow_symlinks))
        found[1] = found[2] = 0  # inode and device, as on network drives of Windows
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", unnumbered)
    open_source(model).close()
