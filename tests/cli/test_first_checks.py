"""What is refused in the first second, and the locks and names of outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.encoder import check_encoder
from lowvram.errors import BudgetError, OutputError, UnsupportedError
from lowvram.files.cache import cache_folder
from lowvram.files.lock import OutputLock
from lowvram.files.write import output_error
from lowvram.hardware import budgets
from lowvram.hardware.cgroups import HostMemory
from lowvram.store.reader import Store
from lowvram.video import read_metadata
from tests.cli.test_app import CLIP, refused, run

StoreOf = Callable[[str], Store]
NO_TORCH = """
import sys
from lowvram.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print("torch" in sys.modules)
"""


@pytest.fixture
def model(tiny_store: StoreOf) -> Path:
    return tiny_store("int8").path


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "nothere", "x"],
        ["generate", "nothere", "-p", "a"],
        ["generate", "{model}"],
        ["generate", "{model}", "-p", "a", "--vram", "8"],
        ["generate", "{model}", "-p", "a", "--ram", "lots"],
        ["generate", "{model}", "-p", "a", "--ram", "100000GiB"],
        ["generate", "{model}", "-p", "a", "--width", "64"],
        ["generate", "{model}", "-p", "a", "--size", "64x64", "--width", "64"],
        ["generate", "{model}", "-p", "a", "-o", "clip.gif"],
        ["generate", "{model}", "-p", "a", "-o", "none/clip.mp4"],
        ["generate", "{model}", "--prompt-file", "none.txt"],
        ["plan", "t2v-a15b"],
        ["plan", "t2v-a14b", "--size", "480p", "--vram", "8"],
    ],
    ids=" ".join,
)
def test_p32_what_can_be_known_is_refused_before_torch_is_imported(
    arguments: list[str], model: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *(text.format(model=model) for text in arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n"
    assert done.stderr.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_p32_a_missing_encoder_is_found_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowvram.encoder.ENCODER", "libnone")
    refused(run("generate", model, "-p", "a", *CLIP), 1, "no libnone in it", "pip install")
    refused(run("demo"), 1, "no libnone in it")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UnsupportedError, match="PyAV is not installed"):
        check_encoder()


def test_p32_a_control_group_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for limited_by, said in (("cgroup v2", ", by its cgroup v2"), ("machine", "")):
        small = HostMemory(300 * 10**6, 290 * 10**6, limited_by)
        monkeypatch.setattr(budgets, "host_memory", lambda small=small: small)
        with pytest.raises(BudgetError, match=f"276.57 MiB of memory{said}, and .* container"):
            budgets.check_budgets("auto", "auto")


def test_p27_names_that_another_run_holds_are_passed_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs started at once without --out get two names."""
    monkeypatch.chdir(tmp_path)
    with OutputLock(Path("clip.mp4"), is_file=True):
        assert run("generate", model, "-p", "a", *CLIP).exit_code == 0
    assert Path("clip-2.mp4").exists()
    assert not Path("clip.mp4").exists()
    with OutputLock(Path("mine.mp4"), is_file=True):
        taken = run("generate", model, "-p", "a", "-o", "mine.mp4", *CLIP)
        demo = run("demo", "-o", "mine.mp4")
    for result in (taken, demo):
        refused(result, 1, "mine.mp4 is being written by process", "wait for it or stop it")


def test_p33_overwrite_starts_anew_where_an_interrupted_run_left_its_state(
    model: Path, tmp_path: Path
) -> None:
    out, state = tmp_path / "clip.mp4", tmp_path / "clip.mp4.resume"
    state.write_bytes(b"anything")
    asked = ["generate", model, "-p", "a", "-o", out, *CLIP]
    refused(run(*asked), 1, "continue it with --resume, or start anew with --overwrite")
    result = run(*asked, "--overwrite")
    assert result.exit_code == 0
    assert f"starting anew; removed {state}" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]


def test_errors_of_the_parser_are_json_too(model: Path) -> None:
    for arguments in (
        ["generate", model, "-p", "a", "--steps", "many", "--json"],
        ["generate", model, "-p", "a", "--no-such-option", "--json"],
        ["generate", "--json"],
        ["generate", model, "-p", "a", "--metadata", "none", "--json"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        error = json.loads(result.stdout)["error"]
        assert error["type"] == "UsageError"
        assert error["message"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "no more memory: close other programs"),
        (RuntimeError("can't start new thread"), "no more threads: raise its limit"),
    ],
)
def test_limits_of_the_process_are_one_line(
    error: Exception, text: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lowvram.store.inspect.inspect_path", fail)
    refused(run("inspect", model), 1, text)
    told = json.loads(run("inspect", model, "--json").stdout)
    assert told["error"]["type"] == "OutOfMemoryError"


def test_progress_as_json_is_a_line_per_event(model: Path, tmp_path: Path) -> None:
    result = run(
        "generate", model, "-p", "a", "-o", tmp_path / "clip.mp4", "--progress", "json", *CLIP
    )
    events = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert {"text", "conditioning", "denoise", "decode"} <= {event["phase"] for event in events}
    steps = [event for event in events if event["phase"] == "denoise"]
    assert [(event["done"], event["total"]) for event in steps] == [(0, 2), (1, 2), (2, 2)]
    assert all(event["unit"] == "steps" and event["elapsed_s"] >= 0 for event in steps)
    verified = run("inspect", model, "--verify", "--progress", "json")
    lines = [json.loads(line) for line in verified.stderr.splitlines()]
    assert lines[-1]["done"] == lines[-1]["total"]
    assert {line["phase"] for line in lines} == {"verify"}


def test_the_file_may_carry_the_label_alone_and_another_rate(model: Path, tmp_path: Path) -> None:
    import av

    out = tmp_path / "clip.mp4"
    result = run(
        "generate", model, "-p", "a secret", "-o", out, "--metadata", "label", "--fps", 24, *CLIP
    )
    assert result.exit_code == 0, result.output
    assert set(read_metadata(out)) == {"ai_generated", "generator", "version"}
    assert b"secret" not in out.read_bytes()
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 24


def test_noise_of_a_gpu_needs_a_gpu(model: Path, tmp_path: Path) -> None:
    import torch

    asked = ["generate", model, "-p", "a", "-o", tmp_path / "clip.mp4", *CLIP, "--noise-device"]
    refused(run(*asked, "tpu"), 2, "noise_device is 'tpu': use cpu or cuda")
    if not torch.cuda.is_available():
        refused(run(*asked, "cuda"), 2, "torch finds no GPU: use cpu")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_to_another_disk_are_followed_where_they_are_allowed(
    model: Path, tmp_path: Path
) -> None:
    linked, elsewhere = tmp_path / "model", tmp_path / "disk"
    linked.mkdir()
    elsewhere.mkdir()
    for path in model.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
        (linked / path.name).symlink_to(elsewhere / path.name)
    asked = ["generate", linked, "-p", "a", "-o", tmp_path / "clip.mp4", *CLIP]
    refused(run(*asked), 1, "is a link out of its model folder", "pass --allow-links")
    assert run(*asked, "--allow-links").exit_code == 0
    refused(run("inspect", linked, "--verify"), 1, "pass --allow-links")
    assert run("inspect", linked, "--verify", "--allow-links").exit_code == 0


def test_p33_a_file_that_is_too_large_is_not_told_to_make_room(tmp_path: Path) -> None:
    error = output_error(tmp_path / "x", OSError(27, "File too large"))
    assert type(error) is OutputError
    assert "FAT32" in str(error)
    assert "make room" not in str(error)


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LOWVRAM_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", fail)
    assert cache_folder().name.startswith("lowvram-")


def test_p33_a_lora_at_run_time_is_told_where_it_goes(model: Path) -> None:
    result = run("generate", model, "-p", "a", "--lora", "style.safetensors:0.5")
    refused(result, 2, "lowvram quantize SOURCE MODEL --lora style.safetensors:0.5")
    refused(run("quantize", model.parent, "x", "--lora", "none.safetensors"), 1, "none.safetensors")


def test_p33_a_name_that_is_too_long_is_told_to_be_shorter(model: Path, tmp_path: Path) -> None:
    for length in (250, 254, 300):
        out = tmp_path / f"{'n' * length}.mp4"
        refused(run("generate", model, "-p", "a", "-o", out, *CLIP), 1, "choose a shorter name")
    assert list(tmp_path.iterdir()) == []
