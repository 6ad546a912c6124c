"""Kept prompts: the same bits without reading the encoder, and never a reason for a run to fail;
prompts longer than the model reads.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lowvram
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.cli.app import app
from lowvram.errors import CheckpointError
from lowvram.pipeline import Pipeline
from lowvram.prompt.cache import PromptCache, features_key
from lowvram.store.reader import Store, StoreFile
from lowvram.streaming.block_file import BlockFile
from tests.helpers.runs import CPU, digest, pipeline_of, request_of

StoreOf = Callable[[str], Store]
SHAPE, DTYPE = (5, 64), torch.bfloat16


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def key_of(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts")


@pytest.fixture
def encoder_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is read of the text encoder: `block` for each block."""
    reads: list[str] = []
    read_into, read_rows = BlockFile.read_into, StoreFile.read_rows

    def counted_block(file: BlockFile, *arguments: object, **named: object) -> object:
        if file.path.name == "text_encoder.safetensors":
            reads.append("block")
        return read_into(file, *arguments, **named)  # type: ignore[arg-type]

    def counted_rows(file: StoreFile, name: str, rows: list[int]) -> torch.Tensor:
        reads.append(f"{name}: {len(rows)} rows")
        return read_rows(file, name, rows)

    monkeypatch.setattr(BlockFile, "read_into", counted_block)
    monkeypatch.setattr(StoreFile, "read_rows", counted_rows)
    return reads


def test_a_repeated_prompt_gives_the_same_bits_and_reads_no_encoder(
    tiny_store: StoreOf, cache: PromptCache, encoder_reads: list[str]
) -> None:
    plain = pipeline_of(tiny_store("int8"))
    request = request_of(plain, steps=1)
    expected = digest(plain.generate(request).frames)
    whole = len(encoder_reads)
    assert encoder_reads.count("block") == 2

    def run(**changes: Any) -> str:
        encoder_reads.clear()
        pipeline = pipeline_of(tiny_store("int8"))
        pipeline.prompt_cache = cache
        return digest(pipeline.generate(request_of(pipeline, steps=1, **changes)).frames)

    assert run() == expected
    assert len(encoder_reads) == whole
    assert run() == expected
    assert encoder_reads == []
    other = run(prompt="a blue square")
    assert other != expected, "another prompt must give another video"
    assert len(encoder_reads) == whole - 1, "the negative prompt was kept"
    for path in cache.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert run() == expected
    assert len(encoder_reads) == whole


def test_the_embedding_is_read_row_by_row(
    tiny_store: StoreOf, encoder_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of UMT5-XXL is 2.1 GB; a prompt needs a few rows of it."""
    whole: list[str] = []
    read = StoreFile.read

    def noted(file: StoreFile, name: str) -> torch.Tensor:
        whole.append(name)
        return read(file, name)

    monkeypatch.setattr(StoreFile, "read", noted)
    pipeline = pipeline_of(tiny_store("int8"))
    pipeline.generate(request_of(pipeline, prompt="a ball", negative_prompt="a", steps=1))
    assert [name for name in encoder_reads if name != "block"] == [
        f"token_embedding.weight: {count} rows" for count in (3, 2)
    ]
    assert "token_embedding.weight" not in whole


def test_rows_are_those_of_the_whole_tensor(tiny_store: StoreOf) -> None:
    file = tiny_store("int8").files["text_encoder"]
    rows = [7, 0, 255, 7]
    assert torch.equal(
        file.read_rows("token_embedding.weight", rows), file.read("token_embedding.weight")[rows]
    )
    for wrong in ([256], [-1]):
        with pytest.raises(CheckpointError, match="missing"):
            file.read_rows("token_embedding.weight", wrong)
    with pytest.raises(CheckpointError, match="missing"):
        file.read_rows("no.such.tensor", [0])


def test_the_key_tells_apart_everything_that_features_follow_from(tiny_store: StoreOf) -> None:
    config = tiny_store("int8").config.text_encoder
    keys = [
        features_key({"a": "1"}, config, [1, 2], torch.bfloat16, CPU),
        features_key({"a": "2"}, config, [1, 2], torch.bfloat16, CPU),
        features_key({"a": "1"}, config, [2, 1], torch.bfloat16, CPU),
        features_key({"a": "1"}, config, [1, 2], torch.float32, CPU),
        features_key(
            {"a": "1"},
            tiny_store("int8").config.text_encoder.__class__(num_heads=4),
            [1, 2],
            torch.bfloat16,
            CPU,
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == features_key({"a": "1"}, config, (1, 2), torch.bfloat16, CPU)


def test_what_is_kept_comes_back_and_damage_does_not(cache: PromptCache) -> None:
    key = key_of(1)
    assert cache.load(key, SHAPE, DTYPE) is None
    cache.save(key, features())
    found = cache.load(key, SHAPE, DTYPE)
    assert found is not None
    assert torch.equal(found, features())
    assert cache.load(key, (4, 64), DTYPE) is None
    assert cache.load(key, SHAPE, torch.float16) is None
    assert cache.load(key_of(2), SHAPE, DTYPE) is None
    path = next(cache.folder.iterdir())
    good = path.read_bytes()
    for damaged in (
        good[:-1],
        good + b"\0",
        b"",
        b"garbage",
        good[:-20] + bytes(20),
        good.replace(key.encode(), key_of(2).encode()),
    ):
        path.write_bytes(damaged)
        assert cache.load(key, SHAPE, DTYPE) is None
    save_file({"features": features(1)}, path)  # a good file, but not one of lowvram's
    assert cache.load(key, SHAPE, DTYPE) is None
    path.write_bytes(bytes(10**6))
    assert cache.load(key, SHAPE, DTYPE) is None
    cache.save(key, features())
    found = cache.load(key, SHAPE, DTYPE)
    assert found is not None
    assert torch.equal(found, features())


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, limit_bytes=0)
    cache.save(key_of(0), features())
    assert list(tmp_path.iterdir()) == []
    cache.limit_bytes = 10**6
    cache.save(key_of(0), features())
    nbytes = next(tmp_path.iterdir()).stat().st_size
    cache.limit_bytes = 3 * nbytes
    for number in range(1, 3):
        cache.save(key_of(number), features())
    now = time.time()
    for number in range(3):
        os.utime(
            tmp_path / f"{key_of(number)}.safetensors", (now - 100 + number, now - 100 + number)
        )
    assert cache.load(key_of(0), SHAPE, DTYPE) is not None  # used now, so the next is the oldest
    (tmp_path / "notes.txt").write_text("not ours")
    old = tmp_path / "dead.partial"
    old.write_bytes(b"half")
    os.utime(old, (now - 7200, now - 7200))
    cache.save(key_of(3), features())
    assert sorted(path.name[62:64] for path in tmp_path.glob("*.safetensors")) == ["00", "02", "03"]
    assert (tmp_path / "notes.txt").exists()
    assert not old.exists()


def test_a_folder_that_cannot_be_written_or_read_fails_no_run(
    tiny_store: StoreOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    request = request_of(pipeline, steps=1)
    expected = digest(pipeline.generate(request).frames)
    (tmp_path / "file").write_text("in the way")
    pipeline.prompt_cache = PromptCache(tmp_path / "file")
    assert digest(pipeline.generate(request).frames) == expected

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowvram.prompt.cache.write_all", full)
    pipeline.prompt_cache = PromptCache(tmp_path / "full")
    assert digest(pipeline.generate(request).frames) == expected
    assert list((tmp_path / "full").iterdir()) == []


def test_two_processes_keep_the_same_prompt_without_harm(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from lowvram.prompt.cache import "
        "PromptCache\n"
        "cache = PromptCache(Path(sys.argv[1])); rows = torch.arange(64000, "
        "dtype=torch.float32).view(1000, 64)\n"
        "for _ in range(40):\n"
        "    cache.save('a' * 64, rows); found = cache.load('a' * 64, (1000, 64), torch.float32)\n"
        "    assert found is not None and torch.equal(found, rows)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == [f"{'a' * 64}.safetensors"]


def test_the_option_and_the_parameter_turn_it_off(
    tiny_store: StoreOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = tiny_store("int8").path
    kept = tmp_path / "cache" / "lowvram" / "prompts"
    loaded = lowvram.load(store, device="cpu", prompt_cache=False)
    loaded.store.close()
    assert loaded.prompt_cache is None
    command = [
        "generate",
        store,
        "--prompt",
        "a",
        "--size",
        "64x64",
        "--frames",
        1,
        "--steps",
        1,
        "--device",
        "cpu",
        "--overwrite",
    ]
    arguments = [str(part) for part in (*command, "--out", tmp_path / "clip.mp4")]
    assert CliRunner().invoke(app, [*arguments, "--no-prompt-cache"]).exit_code == 0
    assert not kept.exists()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(list(kept.iterdir())) == 2


def test_a_prompt_longer_than_the_model_reads_is_told_of(
    tiny_store: StoreOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline: Pipeline = pipeline_of(tiny_store("int8"))  # reads 32 tokens
    long = request_of(pipeline, prompt="a ball " * 30, negative_prompt="a red ball " * 15, steps=1)
    with caplog.at_level(logging.WARNING):
        pipeline.generate(long)
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt has 61 tokens, but the model reads only 32: the rest is cut off",
        "the negative prompt has 46 tokens, but the model reads only 32: the rest is cut off",
    ]
    assert pipeline.prompt_tokens(long) == {
        "prompt": {"tokens": 61, "kept": 32},
        "negative_prompt": {"tokens": 46, "kept": 32},
    }
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipeline.generate(request_of(pipeline, prompt="a ball", negative_prompt="a", steps=1))
    assert not caplog.records
    command = [
        "generate",
        tiny_store("int8").path,
        "--prompt",
        "a ball " * 30,
        "--negative-prompt",
        "a",
        "--json",
        "--overwrite",
    ]
    sizes = [
        "--size",
        "64x64",
        "--frames",
        1,
        "--steps",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "clip.mp4",
    ]
    result = CliRunner().invoke(app, [str(part) for part in (*command, *sizes)])
    assert json.loads(result.stdout)["prompt_tokens"] == {
        "prompt": {"tokens": 61, "kept": 32},
        "negative_prompt": {"tokens": 2, "kept": 2},
    }


def test_reading_rows_of_a_file_that_was_cut_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file({"table": torch.arange(64, dtype=torch.float32).view(8, 8)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match=r"row 7 of .*table.* is truncated"):
            file.read_rows("table", [0, 7])
