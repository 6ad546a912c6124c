"""The command line as a user meets it: what it prints, writes, refuses, and leaves behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import lowvram
from lowvram.cli.app import app
from lowvram.errors import UsageError
from lowvram.request import Request
from lowvram.sampling.state import RunState, save_state
from lowvram.store.reader import Store
from lowvram.video import read_metadata
from tests.helpers.checkpoints import accept_changes, tiny_config, write_official

StoreOf = Callable[[str], Store]
CLIP = ["--size", "64x64", "--frames", "5", "--steps", "2", "--device", "cpu"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *texts: str) -> None:
    """One line that says what, where and what to do."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for text in texts:
        assert text in lines[0]
    assert "Traceback" not in result.output


@pytest.fixture
def model(tiny_store: StoreOf) -> Path:
    return tiny_store("int8").path


def test_generate_writes_a_playable_clip_that_says_what_it_is(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    result = run(
        "generate", model, "--prompt", "a red circle", "--seed", 3, "--out", out, "--json", *CLIP
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["out"] == str(out)
    assert told["peak_bytes"]["vram"] <= told["plan"]["peak_vram_bytes"]
    assert (
        set(told["memory"]["planned"])
        == set(told["memory"]["actual"])
        == {"text", "conditioning", "denoise", "decode"}
    )
    metadata = read_metadata(out)
    assert metadata["ai_generated"] is True
    assert metadata["request"]["prompt"] == "a red circle"
    assert metadata["request"]["seed"] == 3
    with av.open(str(out)) as container:
        frames = list(container.decode(video=0))
    assert [(frame.width, frame.height) for frame in frames] == [(64, 64)] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]


def test_the_same_command_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    for name in ("one.mp4", "two.mp4"):
        assert (
            run(
                "generate", model, "--prompt", "a circle", "--out", tmp_path / name, *CLIP
            ).exit_code
            == 0
        )
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_progress_names_every_phase(model: Path, tmp_path: Path) -> None:
    result = run("generate", model, "--prompt", "a circle", "--out", tmp_path / "clip.mp4", *CLIP)
    for text in ("plan:", "reading the prompt", "denoising", "decoding frames", "peak memory"):
        assert text in result.stderr


@pytest.mark.parametrize(
    ("changes", "code", "texts"),
    [
        (["--size", "60x64"], 2, ("width 60", "use 64")),
        (["--size", "64"], 2, ("'64'", "832x480")),
        (["--frames", "6"], 2, ("frames 6 is not 4n+1", "use 5")),
        (["--vram", "1MiB"], 1, ("VRAM of 1.00 MiB is too little", "--vram")),
        (["--ram", "1MiB"], 1, ("RAM of 1.00 MiB is too little", "--ram")),
        (["--vram", "lots"], 2, ("'lots'", "8GiB")),
        (["--vram", "100000GiB"], 1, ("the VRAM budget is 97.66 TiB, but this machine has",)),
        (["--device", "tpu"], 2, ("unknown device 'tpu'",)),
        (["--solver", "ddim"], 2, ("unknown solver 'ddim'", "unipc, euler")),
        (["--out", "clip.gif"], 2, ("clip.gif", "use clip.mp4")),
        (["--out", "no/such/folder/clip.mp4"], 1, ("no/such/folder does not exist",)),
        (["--resume"], 1, ("nothing to resume", "run without --resume")),
        (
            ["--steps", "1001"],
            2,
            ("steps 1001 is more than the 1000 timesteps", "use 1000 at most"),
        ),
        (["--vram", "0GiB"], 2, ("the VRAM budget is '0GiB'", "8GiB, or auto")),
        (["--device", "cuda:abc"], 2, ("unknown device 'cuda:abc'", "available are auto, cpu")),
        (["--device", "cuda:99"], 2, ("device cuda:99", "cpu")),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    code: int,
    texts: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("generate", model, "--prompt", "a circle", *CLIP, *changes), code, *texts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"vram": -5},
        {"vram": 1.5},
        {"vram": 0},
        {"ram": True},
        {"device": "cuda:abc"},
        {"model": None},
    ],
)
def test_loading_from_python_raises_errors_of_lowvram(changes: dict[str, Any], model: Path) -> None:
    with pytest.raises(UsageError, match=r"budget is|unknown device|model is None"):
        lowvram.load(**{"model": model, "device": "cpu", **changes})


def test_requests_from_python_raise_errors_of_lowvram(model: Path) -> None:
    pipeline = lowvram.load(model, device="cpu")
    with pipeline.store:
        assert pipeline.request("a", size="64x48", frames=5) == pipeline.request(
            "a", size=(64, 48), num_frames=5
        )
        assert pipeline.request("a", size=[64, 48]).height == 48
        wrong: list[dict[str, Any]] = [
            {"size": (64,)},
            {"size": 64},
            {"size": "64"},
            {"size": (64, "48")},
            {"frames": "5"},
        ]
        wrong += [
            {"seed": "a"},
            {"seed": 1.5},
            {"guidance_high": "a"},
            {"steps": 2.5},
            {"steps": True},
            {"width": 64.0},
            {"prompt": None},
        ]
        for changes in wrong:
            with pytest.raises(UsageError, match=r"expected|write it like"):
                pipeline.request(**{"prompt": "a", **changes})


def test_prompts_come_from_text_or_from_a_file(model: Path, tmp_path: Path) -> None:
    refused(run("generate", model, *CLIP), 2, "--prompt TEXT or --prompt-file FILE")
    refused(run("generate", model, "--prompt", " ", *CLIP), 2, "the prompt is empty")
    missing = run("generate", model, "--prompt-file", tmp_path / "none.txt", *CLIP)
    refused(missing, 1, "none.txt", "No such file", "check the name, or use --prompt TEXT")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(
        run("generate", model, "--prompt-file", tmp_path / "binary.txt", *CLIP),
        1,
        "binary.txt",
        "not UTF-8",
    )
    (tmp_path / "prompt.txt").write_text("a blue square\n", encoding="utf-8")
    out = tmp_path / "clip.mp4"
    assert (
        run(
            "generate", model, "--prompt-file", tmp_path / "prompt.txt", "--out", out, *CLIP
        ).exit_code
        == 0
    )
    assert "a blue square" in read_metadata(out)["request"]["prompt"]
    (tmp_path / "notepad.txt").write_bytes("a blue square".encode("utf-8-sig"))
    assert (
        run(
            "generate",
            model,
            "--prompt-file",
            tmp_path / "notepad.txt",
            "--out",
            out,
            "--overwrite",
            *CLIP,
        ).exit_code
        == 0
    )
    assert read_metadata(out)["request"]["prompt"] == "a blue square"


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "a circle", *CLIP], ["inspect"], ["quantize", "MODEL"]]
)
def test_a_folder_that_may_not_be_read_is_refused_in_one_line(
    command: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's answer is made up, because root may read everything; the next test asks the
    system itself.
    """
    name, *rest = command
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode, **_: Path(path) != model)
    refused(
        run(name, model, *rest),
        1,
        f"cannot read {model}: Permission denied",
        "check its owner and its permissions",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inner", [".", "model"])
def test_the_system_is_asked_whether_a_folder_may_be_read(inner: str, tmp_path: Path) -> None:
    (tmp_path / "closed" / "model").mkdir(parents=True)
    closed = tmp_path / "closed"
    closed.chmod(0)
    if os.access(closed, os.R_OK):
        closed.chmod(0o700)
        pytest.skip("whoever runs this, such as root, may read every folder")
    try:
        for name, *rest in (
            ["generate", "--prompt", "a circle", *CLIP],
            ["inspect"],
            ["quantize", tmp_path / "new"],
        ):
            refused(
                run(name, closed / inner, *rest),
                1,
                f"cannot read {closed / inner}: Permission denied",
                "permissions",
            )
    finally:
        closed.chmod(0o700)


def test_names_that_no_file_can_have_are_refused_in_one_line(tmp_path: Path) -> None:
    refused(run("inspect", tmp_path / ("n" * 300)), 1, "File name too long", "check its name")


def test_an_existing_output_stays(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"precious")
    refused(
        run("generate", model, "--prompt", "a circle", "--out", out, *CLIP),
        1,
        "clip.mp4",
        "--overwrite",
    )
    assert out.read_bytes() == b"precious"
    assert (
        run("generate", model, "--prompt", "a circle", "--out", out, "--overwrite", *CLIP).exit_code
        == 0
    )
    assert out.stat().st_size > 500


def test_models_that_are_none_are_refused(tmp_path: Path) -> None:
    refused(
        run("generate", tmp_path / "none", "--prompt", "a", *CLIP),
        1,
        "does not exist",
        "lowvram quantize",
    )
    refused(
        run("generate", tmp_path, "--prompt", "a", *CLIP),
        1,
        "lowvram.json",
        "lowvram quantize SOURCE MODEL",
    )
    source = write_official(tmp_path / "source", tiny_config())
    for command in (["generate", source, "--prompt", "a", *CLIP], ["plan", source]):
        refused(
            run(*command),
            1,
            "source is a model that is not quantized yet",
            "lowvram quantize",
            "source MODEL",
        )
    refused(run("inspect", tmp_path / "none"), 1, "none does not exist", "give a .safetensors file")
    refused(run("plan", "t2v-a15b"), 2, "neither a folder nor a variant", "t2v-a14b")


def test_damaged_sources_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, model = tmp_path / "source", tmp_path / "model"
    write_official(source, tiny_config())
    shard = next((source / "high_noise_model").glob("*-00002-*"))
    moved = shard.rename(tmp_path / "moved")
    refused(
        run("quantize", source, model), 1, shard.name, "lacks 1 of the 2 shards", "download them"
    )
    moved.rename(shard)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(run("quantize", source, model), 1, shard.name)
    config = source / "low_noise_model" / "config.json"
    config.write_text(config.read_text().replace('"dim": 256', '"dim": 512'))
    refused(
        run("quantize", source, model),
        1,
        str(source),
        "config.json of high_noise_model and low_noise_model differ",
        "from one model",
    )
    config.unlink()
    refused(run("quantize", source, model), 1, f"{config} is missing", "download it again")
    shutil.rmtree(config.parent)
    refused(
        run("quantize", source, model),
        1,
        f"the folder {config.parent} is missing",
        "download it again",
    )
    assert not model.exists()


def test_a_wrong_shape_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source, model = tmp_path / "source", tmp_path / "model"
    write_official(source, tiny_config(), shards=1)
    file = source / "low_noise_model" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"head.modulation": torch.ones(1, 2, 128)}, file)
    what = (
        "low_noise",
        "1 tensors have the wrong shape",
        "head.modulation is [1, 2, 128], expected [1, 2, 256]",
    )
    refused(run("quantize", source, model), 1, *what, "download it again", "config.json")
    assert not model.exists()


def test_places_that_cannot_be_written_are_refused_with_what_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_official(tmp_path / "source", tiny_config())
    (tmp_path / "afile").write_text("mine")
    refused(
        run("quantize", source, tmp_path / "afile"),
        1,
        "cannot write",
        "afile",
        "it is a file: choose a folder that does not exist",
    )

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    result = run("generate", model, "--prompt", "a circle", "--out", tmp_path / "clip.mp4", *CLIP)
    refused(result, 1, f"cannot write {tmp_path}: Permission denied", "choose another folder")
    assert "plan:" not in result.stderr  # before any work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afile", "source"]


def test_a_drawn_seed_is_shown_and_kept_by_resume(model: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "clip.mp4", tmp_path / "clip.mp4.resume"
    request = Request(prompt="a circle", width=64, height=64, num_frames=5, seed=1234)
    save_state(state, RunState(request, "another model", "int8", 1, torch.zeros(1), {}))
    asked = ["generate", model, "-p", "a circle", "-o", out, *CLIP, "--seed", "-1"]
    resumed = run(*asked, "--resume")
    assert "seed: 1234\n" in resumed.stderr
    state.unlink()
    fresh = run(*asked)
    assert fresh.exit_code == 0
    assert re.search(r"^seed: \d+$", fresh.stderr, re.MULTILINE)


def test_a_state_that_does_not_fit_is_refused_with_a_way_out(model: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "clip.mp4", tmp_path / "clip.mp4.resume"
    asked = ["generate", model, "--prompt", "a circle", "--out", out, *CLIP]
    other = Request(prompt="a square", width=64, height=64, num_frames=5)
    save_state(state, RunState(other, "another model", "int8", 1, torch.zeros(1), {}))
    refused(
        run(*asked, "--resume"),
        1,
        "belongs to another run",
        "a square",
        "remove it and run without --resume",
    )
    save_file({"latents": torch.zeros(1)}, state, metadata={"lowvram_state": "1"})
    refused(
        run(*asked, "--resume"), 1, "is of state version 1", "remove it and run without --resume"
    )
    state.write_bytes(b"garbage")
    refused(
        run(*asked, "--resume"),
        1,
        "is not the state of an interrupted run",
        "remove it and run without --resume",
    )
    state.unlink()
    assert run(*asked).exit_code == 0


def test_p12_one_expert_in_the_place_of_both_makes_no_video(model: Path, tmp_path: Path) -> None:
    broken, out = shutil.copytree(model, tmp_path / "model"), tmp_path / "clip.mp4"
    shutil.copy(broken / "high_noise.safetensors", broken / "low_noise.safetensors")
    told = "low_noise.safetensors", "head.modulation", "quantize again or restore", "inspect"
    refused(run("generate", broken, "--prompt", "a circle", "--out", out, *CLIP), 1, *told)
    refused(run("plan", broken), 1, *told)
    assert not out.exists()


@pytest.mark.parametrize(
    ("defaults", "text"),
    [
        ({"width": 70}, "width 70 is not a positive multiple of 16: use 64"),
        ({"num_frames": 80}, "frames 80 is not 4n+1: use 81"),
        ({"steps": 2000}, "steps 2000 is more than"),
        ({"shift": 0}, "shift 0.0 is not a positive number"),
    ],
)
def test_defaults_that_no_request_could_use_are_refused_at_once(
    defaults: dict[str, float], text: str, tmp_path: Path
) -> None:
    source = write_official(tmp_path / "source", tiny_config())
    (source / "lowvram_defaults.json").write_text(json.dumps(defaults))
    refused(
        run("quantize", source, tmp_path / "model"), 1, str(source / "lowvram_defaults.json"), text
    )
    assert not (tmp_path / "model").exists()


def test_p32_a_wrong_path_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from lowvram.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: sys.exit(9 if 'torch' in sys.modules else end.code)"
    )
    clip = ["--prompt", "a", "--out", "clip.mp4"]
    for arguments in (
        ["quantize", "nothere", "new"],
        ["generate", "nothere", *clip],
        ["generate", str(tmp_path), "--prompt", "a", "--out", "clip.gif"],
        ["generate", str(tmp_path), *clip, "--width", "64"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        assert done.returncode in (1, 2), (arguments, done.returncode, done.stderr)
        assert "error: " in done.stderr


def test_errors_are_json_too(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "none", "--json")
    refused(result, 1, "does not exist")
    assert "does not exist" in json.loads(result.stdout)["error"]["message"]
    result = run("--quiet", "inspect", tmp_path / "none")
    refused(result, 1, "does not exist")


def test_a_prompt_comes_from_standard_input_and_has_an_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--width", "64", "--height", "64", *CLIP[2:]]
    command = ["generate", str(model), "--prompt-file", "-", "--guidance", "1", "--json", *size]
    for name in ("clip.mp4", "clip-2.mp4"):
        result = CliRunner().invoke(app, ["--quiet", *command], input="a red circle")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        facts = json.loads(result.stdout)
        assert facts["out"] == name
        asked = facts["request"]
        assert asked["prompt"] == "a red circle"
        assert (asked["guidance_high"], asked["guidance_low"]) == (1, 1)
    assert sorted(os.listdir()) == ["clip-2.mp4", "clip.mp4"]
    for file in ("-", "/dev/zero") if Path("/dev/zero").exists() else ("-",):
        result = CliRunner().invoke(
            app, ["generate", str(model), "--prompt-file", file], input="a" * 100_000
        )
        refused(result, 2, "longer than")


def test_quantize_says_what_it_lost(tmp_path: Path) -> None:
    source, model = tmp_path / "source", tmp_path / "model"
    write_official(source, tiny_config())
    result = run("quantize", source, model, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["model"] == str(model)
    assert facts["groups"]
    assert len(result.stdout) < 10_000
    refused(run("quantize", source, model), 1, "--overwrite")
    result = run("inspect", model, "--verify", "--json")
    assert json.loads(result.stdout)["verified"] is True
    file = model / "low_noise.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    refused(run("inspect", model, "--verify"), 1, "low_noise blocks.1.")


def test_plan_answers_for_a_card_of_the_table() -> None:
    card = ["--gpu", "rtx 3060", "--ram", "16GiB"]
    plan = json.loads(
        run(
            "plan",
            "t2v-a14b",
            "--size",
            "832x480",
            *card,
            "--link",
            "PCIe 3.0 x8",
            "--disk",
            "7GB",
            "--json",
        ).stdout
    )
    assert plan["prediction"]["machine"] == "RTX 3060 12GB"
    assert plan["prediction"]["basis"] == "predicted"
    assert plan["peak_vram_bytes"] <= 12 * 2**30
    table = run("plan", "t2v-a14b", "--size", "832x480", *card).stdout
    for text in ("RTX 3060 12GB", "a denoising step, predicted", "the video, predicted"):
        assert text in table
    refused(run("plan", "t2v-a14b", "--gpu", "RTX 3080"), 2, "RTX 3080 10GB, RTX 3080 12GB")
    refused(run("plan", "t2v-a14b", "--gpu", "RTX 3060", "--link", "PCIe 9 x16"), 2, "PCIe", "x8")
    for size in ([], ["--size", "832x480"]):
        refused(
            run("plan", "t2v-a14b", *size, *card, "--disk", "PCIe 4.0 x4"),
            2,
            "'PCIe 4.0 x4': give the bytes that the disk reads per second, like 3.5GB",
        )
        refused(
            run("plan", "t2v-a14b", *size, *card, "--vram", "24GB"),
            1,
            "VRAM of 22.35 GiB",
            "RTX 3060 12GB has 12.00 GiB",
        )
    refused(
        run("plan", "t2v-a14b", "--size", "832x480", "--link", "PCIe 3.0 x8"),
        2,
        "no times are predicted: name a card with --gpu",
    )


def test_plan_says_what_the_budgets_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not against the plan's own short chunks: against everything resident in long ones."""
    monkeypatch.setenv("COLUMNS", "200")
    hd = ["plan", "t2v-a14b", "--size", "1280x720", "--gpu", "RTX 3060 12GB", "--ram", "2GB"]
    table = " ".join(run(*hd, "--vram", "3593MiB").stdout.split())
    told = re.search(r"(\d+\.\d)% more than with all blocks resident", table)
    assert told is not None, table
    assert 90 < float(told[1]) < 110
    assert "0.0% more than with all blocks resident" in " ".join(
        run(*hd, "--vram", "12GiB").stdout.split()
    )


@pytest.mark.parametrize("command", [["plan", "t2v-a14b", "--vram", "12GB"], ["demo"]])
def test_an_unknown_dtype_of_values_is_an_error_that_names_the_known(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWVRAM_PV", "fp4")
    monkeypatch.chdir(tmp_path)
    refused(run(*command), 2, "LOWVRAM_PV=fp4: use one of int8, fp16, fp8, bf16")


def test_plan_says_why_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fp32 = ["plan", "t2v-a14b", "--format", "fp32", "--ram", "64GiB"]
    size = ["--size", "640x384", "--frames", "33"]
    for asked in ([*fp32, *size, "--gpu", "H200"], [*fp32, "--gpu", "H200"]):
        table = " ".join(run(*asked).stdout.split())
        assert "no rate for fp32" in table
        assert "--gpu" not in table
    assert "name a card with --gpu" in " ".join(run(*fp32, *size, "--vram", "24GB").stdout.split())
    assert json.loads(run(*fp32, *size, "--gpu", "H200", "--json").stdout)["prediction"] is None


@pytest.mark.parametrize("size", [[], ["--size", "640x384"]])
def test_plan_says_that_image_to_video_does_not_run_yet(size: list[str]) -> None:
    for variant, told in (("i2v-a14b", True), ("t2v-a14b", False)):
        table = " ".join(
            run("plan", variant, *size, "--frames", "33", "--gpu", "H200").stdout.split()
        )
        assert (
            "can be planned but not run yet; encoding the image is not counted" in table
        ) == told


def test_plan_without_a_size_says_what_fits() -> None:
    asked = ["plan", "i2v-a14b", "--frames", "81", "--vram", "3.3GB", "--ram", "8GB"]
    matrix = json.loads(run(*asked, "--json").stdout)
    assert matrix["times_are"] == "predicted"
    assert matrix["machine"] == "RTX 4090"
    fits = {(cell["width"], cell["height"]): cell["fits"] for cell in matrix["cells"]}
    assert fits == {(640, 384): True, (832, 480): True, (1280, 720): False}
    assert all(("prediction" in cell) == cell["fits"] for cell in matrix["cells"])
    table = " ".join(run(*asked).stdout.split())
    for text in ("does not fit", "predicted for RTX 4090", "all times are predictions"):
        assert text in table


def test_generate_sets_predicted_beside_actual_times(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doctor's profile is found by the run that follows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ["generate", model, "--prompt", "a circle", *CLIP]
    assert (
        json.loads(run(*asked, "--out", tmp_path / "a.mp4", "--json").stdout)["seconds"][
            "predicted"
        ]
        is None
    )
    report = json.loads(run("doctor", "--path", tmp_path, "--json").stdout)
    assert report["profile"]["device"] == "cpu"
    told = json.loads(run(*asked, "--out", tmp_path / "b.mp4", "--json").stdout)
    actual, predicted = told["seconds"]["actual"], told["seconds"]["predicted"]
    assert set(predicted) == {"text", "conditioning", "denoise", "decode", "step"}
    assert all(actual[phase] > 0 for phase in predicted)
    assert all(predicted[phase] > 0 for phase in predicted)
    assert told["plan"]["prediction"]["basis"] == "measured"
    shown = run(*asked, "--out", tmp_path / "c.mp4").stderr
    for text in ("predicted:", "actual / predicted", "one denoising step"):
        assert text in shown
    # another plan perhaps, the same video
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_plan_and_doctor_speak_json() -> None:
    plan = json.loads(
        run("plan", "t2v-a14b", "--size", "1280x720", "--frames", "81", "--json").stdout
    )
    assert plan["num_tokens"] == 75_600
    assert plan["peak_vram_bytes"] <= 8 * 2**30
    table = run("plan", "t2v-a14b", "--size", "1280x720", "--vram", "24GiB").stdout
    for text in (
        "activations between blocks",
        "1.44 GiB",
        "keys and values",
        "tokens at a time",
        "blocks that stay",
        "peak of the decode phase",
    ):
        assert text in table
    refused(
        run("plan", "t2v-a14b", "--size", "1280x720", "--vram", "2GiB"),
        1,
        "use --vram",
        "GiB or more",
    )
    assert {
        finding["name"] for finding in json.loads(run("doctor", "--json").stdout)["findings"]
    } >= {"GPU", "Triton", "RAM"}


@pytest.mark.parametrize(
    ("changes", "code", "texts"),
    [
        (["--frames", "6"], 2, ("frames 6 is not 4n+1", "use 5")),
        (["--frames", "0"], 2, ("frames 0 is not 4n+1", "use 1")),
        (["--steps", "-1"], 2, ("steps -1 is less than 1",)),
        (["--steps", "0"], 2, ("steps 0 is less than 1",)),
        (["--refine-steps", "41"], 2, ("refine_steps 41 is outside 0 .. 40, the number of steps",)),
        (["--refine-steps", "-1"], 2, ("refine_steps -1 is outside 0 .. 40",)),
        (["--refine-steps", "1", "--format", "fp8"], 2, ("refines int8 activations", "in fp8")),
        (["--steps", "1001"], 2, ("steps 1001 is more than the 1000 timesteps",)),
        (["--vram", "0GiB"], 2, ("the VRAM budget is '0GiB'",)),
        (["--ram", "lots"], 2, ("'lots'", "8GiB")),
    ],
)
def test_plan_refuses_what_generate_refuses(
    changes: list[str], code: int, texts: tuple[str, ...]
) -> None:
    for size in ([], ["--size", "832x480"]):
        refused(run("plan", "t2v-a14b", *size, *changes), code, *texts)
    refused(run("plan", "t2v-a14b", "--size", "70x64"), 2, "width 70", "use 64")


def test_plan_takes_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a card its share; of this machine what a run here would take, without a GPU on the CPU."""
    monkeypatch.setattr("lowvram.plans.api.free_ram_bytes", lambda: 32 * 2**30)
    asked = ["plan", "t2v-a14b", "--size", "832x480", "--gpu", "rtx 3060", "--json"]
    told = [
        json.loads(run(*asked, *more).stdout)
        for more in (["--vram", "auto", "--ram", "auto"], ["--ram", f"{int(32 * 2**30 * 0.85)}"])
    ]
    assert told[0] == told[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lowvram.hardware.budgets._free_ram", lambda: 64 * 2**30)
    small = ["plan", "t2v-a14b", "--vram", "auto", "--ram", "auto", "--json"]
    plan = json.loads(run(*small, "--size", "64x64", "--frames", "5").stdout)
    assert plan["items"]["context of the driver"] == 0
    assert {cell["vram_bytes"] for cell in json.loads(run(*small).stdout)["cells"]} == {
        int(64 * 2**30 * 0.85 / 2)
    }


def test_doctor_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        refused(
            run("doctor", "--path", tmp_path / name, "--json"),
            2,
            str(tmp_path / name),
            "give --path a folder that exists",
        )


def command(model: Path, out: Path, *more: str) -> list[str]:
    prompt = [
        "--prompt",
        "a red circle",
        "--size",
        "64x64",
        "--frames",
        "17",
        "--steps",
        "40",
        "--device",
        "cpu",
    ]
    return [
        sys.executable,
        "-m",
        "lowvram",
        "generate",
        str(model),
        *prompt,
        "--out",
        str(out),
        *more,
    ]


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_p20_an_interrupted_run_leaves_no_video_and_resumes(
    model: Path, tmp_path: Path, kill: signal.Signals
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    subprocess.run(command(model, whole), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        command(model, cut),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state = tmp_path / "cut.mp4.resume"
    wait_for(state.exists, process)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run(command(model, cut), env=environment, capture_output=True, text=True)
    assert second.returncode == 1
    assert f"is being written by process {process.pid}" in second.stderr
    process.send_signal(kill)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL)
    if kill == signal.SIGINT:
        assert "--resume" in errors
        assert "Traceback" not in errors
    assert not cut.exists()
    assert state.exists()
    again = subprocess.run(command(model, cut), env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert "continue it with --resume" in again.stderr
    resumed = subprocess.run(
        command(model, cut, "--resume"), check=True, env=environment, capture_output=True, text=True
    )
    assert re.search(r"continuing at step [2-9]\d* of ", resumed.stderr)
    assert cut.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert not state.exists()


def test_p20_nan_in_the_latents_makes_no_video(model: Path, tmp_path: Path) -> None:
    """A scale of infinity in one block: quantize would refuse it, so it is planted in the store."""
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    from lowvram.checkpoint.readers.safetensors_header import read_header

    file = broken / "high_noise.safetensors"
    info = read_header(file).tensors["blocks.1.ffn.0.weight_scale"]
    with open(file, "r+b") as handle:
        handle.seek(info.start)
        handle.write(b"\x00\x00\xc0\x7f" * (info.nbytes // 4))  # NaN
    accept_changes(broken, "high_noise", info.name)
    out = tmp_path / "clip.mp4"
    result = run("generate", broken, "--prompt", "a circle", "--out", out, *CLIP)
    refused(result, 1, "step 1 of 2", "expert high_noise", "block 1", "inspect")
    assert not out.exists()


def test_an_official_folder_with_pickles_is_shown(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", tiny_config(), pickle=True)
    result = run("inspect", source)
    assert result.exit_code == 0, result.output
    for text in ("official checkpoint", "high_noise", "a pickle, not opened"):
        assert text in " ".join(result.stdout.split())
    told = json.loads(run("inspect", source, "--json").stdout)
    assert told["components"]["vae"]["note"] == "a pickle, not opened"
    assert run("inspect", source / "Wan2.1_VAE.pth").exit_code == 1
