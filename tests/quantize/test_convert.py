"""Tests the conversion of a checkpoint to a store: contents, errors and report."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from lowvram_quantize import build, recipe
from lowvram_quantize.convert import quantize
from lowvram_quantize.int8 import dequantize_int8
from lowvram_quantize.journal import RunJournal
from lowvram_quantize.progress import QuantizeProgress
from lowvram_quantize.report import read_report, summarize, summary_table
from lowvram_quantize.rotate import rotate
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.errors import (
    CheckpointError,
    DiskFullError,
    LowvramError,
    MissingTensorsError,
    NonFiniteError,
    OutputError,
    ResumeError,
    UnsafeFileError,
    UsageError,
)
from lowvram.files import read as disk
from lowvram.files.lock import LOCK_NAME
from lowvram.formats import FORMATS
from lowvram.store.inspect import inspect_path
from lowvram.store.manifest import MANIFEST_NAME, REPORT_NAME, STAGING_NAME, STORE_FILES
from lowvram.store.reader import open_store
from lowvram.variants import COMPONENTS, EXPERTS
from tests.helpers.checkpoints import tiny_config, tiny_weights, write_diffusers, write_official

CONFIG = tiny_config(num_layers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("source") / "official", CONFIG)


def hashes(model: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(model.iterdir())
        if path.is_file()
    }


class Stopped(Exception):
    pass


class StopAt:
    """A progress callback that aborts the run at the n-th event of the phase."""

    def __init__(
        self, count: int, phase: str = "quantize", error: type[BaseException] = Stopped
    ) -> None:
        self.count = count
        self.phase = phase
        self.error = error

    def __call__(self, progress: QuantizeProgress) -> None:
        self.count -= progress.phase == self.phase
        if self.count == 0:
            raise self.error


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_makes_a_store_that_opens_and_verifies(
    format: str, source: Path, tmp_path: Path
) -> None:
    report = quantize(source, tmp_path / "m", format)
    with open_store(tmp_path / "m") as store:
        assert store.format == format
        assert store.config == CONFIG
        assert store.tokenizer == (source / "google/umt5-xxl/tokenizer.json").read_bytes()
    inspect_path(tmp_path / "m", verify=True)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(
        [MANIFEST_NAME, *STORE_FILES]
    )
    assert report == read_report(tmp_path / "m")


def test_the_stored_int8_weights_are_the_rotated_sources(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "m")
    for expert in EXPERTS:
        weights = tiny_weights(CONFIG, expert)
        stored = load_file(tmp_path / "m" / f"{expert}.safetensors")
        for name in ("blocks.0.self_attn.q.weight", "blocks.0.ffn.2.weight"):
            restored = rotate(dequantize_int8(stored[name], stored[f"{name}_scale"]))
            assert (
                torch.nn.functional.cosine_similarity(
                    restored.flatten(), weights[name].flatten(), 0
                )
                > 0.9999
            )
        assert torch.equal(stored["blocks.0.ffn.2.bias"], weights["blocks.0.ffn.2.bias"])
        assert torch.equal(stored["time_projection.1.weight"], weights["time_projection.1.weight"])
        assert torch.equal(
            stored["text_embedding.0.weight"], weights["text_embedding.0.weight"].bfloat16()
        )


def test_the_files_are_what_comfyui_reads(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "m")
    with safe_open(tmp_path / "m" / "high_noise.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        markers = [name for name in file.keys() if name.endswith(".comfy_quant")]  # noqa: SIM118  (not a dict)
        assert len(markers) == len(layers) == 10
        for marker in markers:
            text = bytes(file.get_tensor(marker).numpy()).decode()
            assert json.loads(text) == {
                "format": "int8_tensorwise",
                "convrot": True,
                "convrot_groupsize": 256,
            }
            layer = marker.removesuffix(".comfy_quant")
            assert layers[layer] == json.loads(text)
            assert file.get_slice(f"{layer}.weight").get_dtype() == "I8"
            assert file.get_tensor(f"{layer}.weight_scale").shape == (
                file.get_slice(f"{layer}.weight").get_shape()[0],
                1,
            )


def test_the_yardstick_fp32_keeps_every_bit(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "m", "fp32")
    for component in COMPONENTS:
        stored = load_file(tmp_path / "m" / f"{component}.safetensors")
        weights = tiny_weights(CONFIG, component)
        assert set(stored) == set(weights)
        assert all(torch.equal(stored[name].double(), weights[name].double()) for name in weights)
    assert report.tensors == ()


def test_both_layouts_give_the_same_files(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "one")
    quantize(write_diffusers(tmp_path / "diffusers", CONFIG), tmp_path / "two")
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert one.pop(MANIFEST_NAME) != two.pop(MANIFEST_NAME)  # the manifest names the source
    assert one == two


def test_pickled_parts_need_leave_and_give_the_same_files(source: Path, tmp_path: Path) -> None:
    pickled = write_official(tmp_path / "pickled", CONFIG, pickle=True)
    with pytest.raises(UnsafeFileError):
        quantize(pickled, tmp_path / "m")
    quantize(pickled, tmp_path / "m", allow_pickle=True)
    quantize(source, tmp_path / "plain")
    assert hashes(tmp_path / "m").keys() == hashes(tmp_path / "plain").keys()
    assert all(
        hashes(tmp_path / "m")[f"{name}.safetensors"]
        == hashes(tmp_path / "plain")[f"{name}.safetensors"]
        for name in COMPONENTS
    )


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_p04_the_number_of_threads_changes_no_byte(
    format: str, source: Path, tmp_path: Path
) -> None:
    found = []
    for threads in (1, 2, 3):
        quantize(source, tmp_path / str(threads), format, threads=threads)
        found.append(hashes(tmp_path / str(threads)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("stop", [1, 7, 60, 130])
def test_p01_a_stopped_run_is_resumed_to_the_same_bytes(
    stop: int, source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "whole")
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(stop))
    with pytest.raises(CheckpointError, match="--resume"):
        open_store(tmp_path / "m")
    events: list[QuantizeProgress] = []
    quantize(source, tmp_path / "m", resume=True, progress=events.append)
    assert {event.phase for event in events} == {"quantize"}  # the search for NaN is not repeated
    assert hashes(tmp_path / "m") == hashes(tmp_path / "whole")


def test_resume_where_there_is_nothing_starts_and_where_all_is_done_does_nothing(
    source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "m", resume=True)
    before = hashes(tmp_path / "m")
    events: list[QuantizeProgress] = []
    report = quantize(source, tmp_path / "m", resume=True, progress=events.append)
    assert not events
    assert report.tensors
    assert hashes(tmp_path / "m") == before


def test_resume_measures_again_what_the_state_lost(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole")
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(100))
    state = tmp_path / "m" / STAGING_NAME / build.JOURNAL_NAME
    lines = state.read_bytes().splitlines(keepends=True)
    assert len(lines) > 10
    state.write_bytes(b"".join(lines[:4]) + b'{"component": "hi')
    quantize(source, tmp_path / "m", resume=True)
    assert hashes(tmp_path / "m") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"entry": {"component": "x"}, "sha256": ""}'])
def test_p26_alien_lines_of_the_state_are_measured_again(
    line: bytes, source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "whole")
    for place in (0, 3):
        model = tmp_path / f"m{place}"
        with pytest.raises(Stopped):
            quantize(source, model, progress=StopAt(100))
        state = model / STAGING_NAME / build.JOURNAL_NAME
        lines = state.read_bytes().splitlines(keepends=True)
        lines[place] = line + b"\n"
        state.write_bytes(b"".join(lines))
        quantize(source, model, resume=True)
        assert hashes(model) == hashes(tmp_path / "whole")


def test_p26_a_flipped_byte_of_an_unfinished_store_is_found(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole")
    random = Random(0)
    outcomes = set()
    for number in range(20):
        model = tmp_path / f"m{number}"
        with pytest.raises(Stopped):
            quantize(source, model, progress=StopAt(random.randrange(90, 160)))
        files = [file for file in (model / STAGING_NAME).iterdir() if file.stat().st_size]
        file = random.choice(sorted(files))
        data = bytearray(file.read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        file.write_bytes(data)
        try:
            quantize(source, model, resume=True)
        except ResumeError as error:
            outcomes.add("refused" if "start again without --resume" in str(error) else "unclear")
            quantize(source, model)
        else:
            outcomes.add("mended")
        assert hashes(model) == hashes(tmp_path / "whole")
    assert "refused" in outcomes
    assert "unclear" not in outcomes


def test_p05_another_format_is_refused_with_both(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", "int8", progress=StopAt(5))
    with pytest.raises(ResumeError, match=r"format was int8, now fp8"):
        quantize(source, tmp_path / "m", "fp8", resume=True)
    quantize(source, tmp_path / "m", "int8", resume=True)
    with pytest.raises(ResumeError, match=r"format was int8, now fp8"):  # also for a finished store
        quantize(source, tmp_path / "m", "fp8", resume=True)


def test_p05_another_version_is_refused_with_both(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "lowvram_version", lambda: "1.0")
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(5))
    monkeypatch.setattr(recipe, "lowvram_version", lambda: "2.0")
    with pytest.raises(ResumeError, match=r"lowvram_version was 1\.0, now 2\.0"):
        quantize(source, tmp_path / "m", resume=True)


def test_p05_another_source_is_refused(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", CONFIG)
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(5))
    shard = next((source / "low_noise_model").glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ResumeError, match=r"source low_noise was [0-9a-f]{64}, now [0-9a-f]{64}"):
        quantize(source, tmp_path / "m", resume=True)


def test_a_source_that_changes_under_the_run_gives_no_store(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", CONFIG)

    def touch(progress: QuantizeProgress) -> None:
        if progress.phase == "quantize":
            os.utime(source / "Wan2.1_VAE.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        quantize(source, tmp_path / "m", progress=touch)
    assert not (tmp_path / "m" / MANIFEST_NAME).exists()


def test_errors_of_the_system_name_what_they_are_about(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("lowvram.files.read.read_at", refuse)
        with pytest.raises(LowvramError, match="Cannot allocate memory") as caught:
            quantize(source, tmp_path / "m", progress=StopAt(1000))
    assert not isinstance(caught.value, OutputError)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="part of this path is a file: choose another folder"):
        quantize(source, tmp_path / "file" / "m")
    with pytest.raises(OutputError, match="it is a file: choose a folder that does not exist"):
        quantize(source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_that_may_not_be_written_is_refused_with_advice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        OutputError, match=r"m: Permission denied: choose another folder or change its permissions"
    ):
        quantize(source, tmp_path / "m")


def poisoned(path: Path) -> Path:
    source = write_official(path, CONFIG, shards=1)
    for expert, name, count in (
        ("high_noise", "blocks.0.ffn.0.weight", 3),
        ("low_noise", "head.head.bias", 1),
    ):
        file = source / f"{expert}_model" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights[name].view(-1)[-count:] = torch.tensor([float("nan"), float("inf"), float("-inf")])[
            :count
        ]
        save_file(weights, file)
    return source


def test_p08_nan_and_infinity_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = poisoned(tmp_path / "source")
    text = (
        r"in 2 tensors: high_noise blocks\.0\.ffn\.0\.weight \(3\), low_noise "
        r"head\.head\.bias \(1\)"
    )
    with pytest.raises(NonFiniteError, match=text):
        quantize(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(NonFiniteError):
        quantize(source, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]


def test_a_finished_store_is_replaced_only_on_request_and_only_when_the_new_one_is_complete(
    source: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m"
    quantize(source, model, "fp8")
    old = hashes(model)
    with pytest.raises(OutputError, match="--overwrite"):
        quantize(source, model)
    with pytest.raises(Stopped):
        quantize(source, model, overwrite=True, progress=StopAt(150))
    assert hashes(model) == old
    open_store(model).close()
    quantize(source, model, resume=True)
    quantize(source, tmp_path / "fresh")
    assert hashes(model) == hashes(tmp_path / "fresh")


def test_p02_files_of_something_else_are_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "vae.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"vae\.safetensors"):
        quantize(source, tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["vae.safetensors"]


def test_p02_leftovers_are_named_and_removed(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", "fp8", progress=StopAt(20))
    (tmp_path / "m" / "lowvram.json.partial").write_text("{")
    with caplog.at_level(logging.WARNING):
        quantize(source, tmp_path / "m", "int8")
    assert STAGING_NAME in caplog.text
    assert "lowvram.json.partial" in caplog.text
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(
        [MANIFEST_NAME, *STORE_FILES]
    )


def test_p02_files_of_the_user_that_end_in_partial_survive(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    (model / "thesis.partial-draft").mkdir(parents=True)
    (model / "thesis.partial-draft" / "one.txt").write_text("years")
    (model / "movie.mkv.partial").write_text("hours")
    (model / "vae.safetensors.partial").mkdir()  # no run creates a folder of this name
    # the files above are not taken for an unfinished run
    with pytest.raises(CheckpointError, match="it is not a complete quantized model"):
        open_store(model)
    for name in (
        "low_noise.safetensors.partial",
        "low_noise.safetensors.partial.journal",
        "tokenizer.json.partial",
    ):
        (model / name).write_text("left")
    with pytest.raises(CheckpointError, match="is unfinished: continue with"):
        open_store(model)
    quantize(source, model)
    assert (model / "thesis.partial-draft" / "one.txt").read_text() == "years"
    assert (model / "movie.mkv.partial").read_text() == "hours"
    theirs = ["movie.mkv.partial", "thesis.partial-draft", "vae.safetensors.partial"]
    assert sorted(path.name for path in model.iterdir()) == sorted(
        [*theirs, MANIFEST_NAME, *STORE_FILES]
    )


def test_ctrl_c_says_how_to_go_on(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "m", progress=StopAt(20, error=KeyboardInterrupt))
    assert "--resume" in caplog.text
    quantize(source, tmp_path / "m", resume=True)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "n", progress=StopAt(20, "scan", KeyboardInterrupt))
    assert not (tmp_path / "n").exists()


def test_p06_too_little_room_is_told_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    events: list[QuantizeProgress] = []
    with pytest.raises(DiskFullError, match=r"needs .* MB, .*1\.00 MB free"):
        quantize(source, tmp_path / "m", progress=events.append)
    assert not events
    assert not (tmp_path / "m").exists()


def test_progress_counts_bytes_speed_and_time_left(source: Path, tmp_path: Path) -> None:
    events: list[QuantizeProgress] = []
    quantize(source, tmp_path / "m", progress=events.append)
    for phase in ("scan", "quantize"):
        of_phase = [event for event in events if event.phase == phase]
        done = [event.done_bytes for event in of_phase]
        assert done == sorted(done)
        assert done[-1] == of_phase[-1].total_bytes
        assert {event.component for event in of_phase} == set(COMPONENTS)
        assert all(event.bytes_per_s > 0 for event in of_phase)
        assert of_phase[0].left_s > 0 == of_phase[-1].left_s
    # the scan comes first
    assert [event.phase for event in events] == sorted(
        (event.phase for event in events), reverse=True
    )


def test_a_resumed_run_counts_what_is_done_but_not_as_speed(source: Path, tmp_path: Path) -> None:
    whole: list[QuantizeProgress] = []
    quantize(source, tmp_path / "whole", progress=whole.append)
    whole = [event for event in whole if event.phase == "quantize"]
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(100))
    events: list[QuantizeProgress] = []
    quantize(source, tmp_path / "m", resume=True, progress=events.append)
    assert [(event.tensor, event.done_bytes) for event in events] == [
        (event.tensor, event.done_bytes) for event in whole[100:]
    ]
    assert events[0].done_bytes > 1e6
    new_bytes = whole[100].done_bytes - whole[99].done_bytes
    assert events[0].bytes_per_s < new_bytes / 1e-5


def test_the_report_lists_every_linear_and_its_table_fits_a_terminal(
    source: Path, tmp_path: Path
) -> None:
    report = quantize(source, tmp_path / "m")
    data = json.loads((tmp_path / "m" / REPORT_NAME).read_text())
    linears = [entry for entry in data["tensors"] if entry["dtype"] == "I8"]
    assert len(linears) == 2 * 10 * 1 + 7 * 2
    assert all(
        40 < entry["sqnr_db"] < 50 and 0.999 < entry["cosine"] <= 1 and entry["max_abs_error"] > 0
        for entry in linears
    )
    assert data["groups"] == summarize(report.tensors)
    groups = {(group["component"], group["kind"]): group for group in data["groups"]}
    assert groups["text_encoder", "attn.q"]["tensors"] == 2
    assert (
        groups["text_encoder", "attn.q"]["min_sqnr_db"]
        <= groups["text_encoder", "attn.q"]["mean_sqnr_db"]
    )
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary_table(report))
    text = console.export_text()
    assert "cross_attn.q" in text
    assert "…" not in text


def test_the_source_itself_is_no_place_for_the_store(source: Path) -> None:
    with pytest.raises(OutputError, match="the checkpoint itself"):
        quantize(source, source)


def test_wrong_requests_are_refused_before_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int9"):
        quantize(source, tmp_path / "m", "int9")
    narrow = write_official(tmp_path / "narrow", tiny_config(num_layers=1, ffn_dim=320))
    with pytest.raises(UsageError, match="int8-plain"):
        quantize(narrow, tmp_path / "m", "int8")
    assert not (tmp_path / "m").exists()


def test_missing_tensors_are_named_before_work(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", CONFIG, shards=1)
    file = source / "low_noise_model" / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if name != "head.modulation"},
        file,
    )
    with pytest.raises(MissingTensorsError, match=r"head\.modulation"):
        quantize(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_lock_is_gone_after_the_run(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "m")
    assert not (tmp_path / "m" / LOCK_NAME).exists()


def test_a_state_cut_at_any_byte_keeps_its_whole_lines(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(8))
    lines = (
        (tmp_path / "m" / STAGING_NAME / build.JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    )
    identity = json.loads(lines[0])["entry"]
    content = b"".join(lines[:4])
    path = tmp_path / "state"
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        with RunJournal(path, identity) as state:
            assert len(state.errors) == max(0, content[:length].count(b"\n") - 1)
        assert path.read_bytes().startswith(lines[0])
        assert path.read_bytes().endswith(b"\n")


def test_p26_a_source_that_was_replaced_between_two_runs_is_refused(tmp_path: Path) -> None:
    """Its size and its time are those of before."""
    source = write_official(tmp_path / "source", CONFIG)
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "m", progress=StopAt(150))
    assert (tmp_path / "m" / STAGING_NAME).exists()
    shard = next((source / "low_noise_model").glob("*.safetensors"))
    status = shard.stat()
    with TensorFile(shard) as file:
        info = max(file.tensors.values(), key=lambda info: info.nbytes)
    with open(shard, "r+b") as content:
        content.seek(info.start)
        content.write(bytes(info.nbytes))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ResumeError, match=r"source low_noise was .*, now "):
        quantize(source, tmp_path / "m", resume=True)


def test_p30_a_disk_that_fails_under_the_source_is_an_error_with_file_and_tensor(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = disk.read_at, 0

    def read_at(*arguments: Any) -> int:
        nonlocal reads
        reads += 1
        if reads > 500:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(disk, "read_at", read_at)
    monkeypatch.setattr(disk, "RETRY_DELAYS_S", (1e-4, 1e-4, 1e-4))
    with pytest.raises(
        CheckpointError,
        match=r"safetensors: reading '\S+' at byte \d+ failed: Input/output error, 4",
    ):
        quantize(source, tmp_path / "m")


def test_names_of_comfyui_are_told_from_a_damaged_download(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", CONFIG, shards=1)
    for expert in ("high_noise", "low_noise"):
        shard = source / f"{expert}_model" / "diffusion_pytorch_model.safetensors"
        weights = load_file(shard)
        save_file(
            {f"model.diffusion_model.{name}": value for name, value in weights.items()}, shard
        )
    with pytest.raises(
        MissingTensorsError, match=r"'model\.diffusion_model\.' are ComfyUI's.*official"
    ):
        quantize(source, tmp_path / "m")
