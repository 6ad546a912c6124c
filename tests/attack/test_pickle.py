"""Promise 13: a pickle is refused unless asked for, never run, and read in one place only."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path

import lowvram_kernels
import lowvram_quantize
import pytest
import torch

import lowvram
from lowvram.checkpoint.readers import pickle as pickle_import
from lowvram.checkpoint.readers.pickle import PickleFile
from lowvram.checkpoint.source import open_source
from lowvram.errors import CheckpointError, LowvramError, UnsafeFileError
from lowvram.variants import COMPONENTS
from tests.helpers.checkpoints import tiny_config, tiny_weights, write_official

CONFIG = tiny_config()


class Payload:
    """Unpickling it creates the file it was given."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_p13_pickle_is_refused_by_default(tmp_path: Path) -> None:
    write_official(tmp_path, CONFIG, shards=1, pickle=True)
    with pytest.raises(UnsafeFileError, match=r"\.pth is a pickle.*--allow-pickle"):
        open_source(tmp_path)


def test_p13_allowed_pickle_gives_the_weights(tmp_path: Path) -> None:
    write_official(tmp_path, CONFIG, shards=1, pickle=True)
    with open_source(tmp_path, allow_pickle=True) as source:
        assert source.config == CONFIG
        for component in COMPONENTS:
            for name, tensor in tiny_weights(CONFIG, component).items():
                info = source.components[component].tensors[name]
                assert info.nbytes == tensor.nbytes
                assert torch.equal(source.components[component].read(name), tensor)


def test_p13_safetensors_wins_over_the_pickle(tmp_path: Path) -> None:
    write_official(tmp_path, CONFIG, shards=1)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"never opened")
    open_source(tmp_path).close()


def test_p13_no_pickle_is_mapped_and_views_are_contiguous(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    base = torch.arange(10**5)
    torch.save({"a": base, "b": torch.ones(3, 2).t(), "c": base[5:9], "d": base[::2]}, path)
    file = PickleFile(path, True)
    assert torch.equal(file.read("a"), base)
    assert torch.equal(file.read("c"), base[5:9])
    assert torch.equal(file.read("d"), base[::2])
    assert torch.equal(file.rows("d")[:], base[::2].reshape(1, -1))
    assert file.sample("d") != file.sample("a")
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert file.read("b").is_contiguous()
    assert file.read("b").shape == (2, 3)
    assert torch.equal(file.rows("b")[1:2], torch.ones(1, 3))
    torch.save({"a": torch.arange(10)}, path)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        file.read("a")


def test_p31_a_tensor_that_expands_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(1).expand(50_000, 50_000)}, path)
    with pytest.raises(CheckpointError, match="takes 10000000000 bytes, but the file holds 4"):
        PickleFile(path, True)


def test_p31_a_compressed_description_is_refused(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.pth", tmp_path / "model.pth"
    torch.save({"a": torch.ones(4)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            packed = zipfile.ZIP_DEFLATED if record.filename.endswith(".pkl") else None
            new.writestr(record.filename, old.read(record), packed)
    with pytest.raises(UnsafeFileError, match=r"data\.pkl' is compressed or larger"):
        PickleFile(path, True)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("allow", [False, True], ids=["refused", "allowed"])
def test_p13_payload_does_not_run(allow: bool, legacy: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "ran"
    torch.save(
        {"weight": torch.ones(2), "evil": Payload(trace)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(LowvramError):
        PickleFile(path, allow)
    assert not trace.exists()
    if legacy:
        return
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload works where nothing guards against it"


def test_p13_bare_pickle_does_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(LowvramError):
        PickleFile(path, True)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(1)],
        {"a": 1},
        {1: torch.ones(1)},
        {"a": {"b": torch.ones(1)}},
        {"a": torch.ones(2).to_sparse()},
    ],
)
def test_p13_what_is_no_flat_dict_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"flat dict|not plain tensors"):
        PickleFile(path, True)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "no pickle inside"])
def test_p13_damaged_pickle_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    if damage == "no pickle inside":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/version", "3")
    else:
        content[200] ^= 255
        path.write_bytes(
            {
                "empty": b"",
                "text": b"hello",
                "cut": bytes(content[:-100]),
                "flipped": bytes(content),
            }[damage]
        )
    with pytest.raises(CheckpointError) as caught:
        PickleFile(path, True)
    assert "\n" not in str(caught.value)


def test_p13_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UnsafeFileError, match=r"torch >= 2\.10 \(found 2\.9\.1"):
        PickleFile(tmp_path / "model.pth", True)


def test_p13_torch_load_occurs_in_one_file_and_restricted() -> None:
    pattern = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler\(|allow_pickle=True")
    sources = [
        path
        for package in (lowvram, lowvram_kernels, lowvram_quantize)
        for path in Path(package.__path__[0]).rglob("*.py")
    ]
    users = [path for path in sources if pattern.search(path.read_text(encoding="utf-8"))]
    assert users == [Path(pickle_import.__file__)]
    calls = re.findall(r"torch\.load\(.*\)", users[0].read_text(encoding="utf-8"))
    assert len(calls) == 1
    assert "weights_only=True" in calls[0]
