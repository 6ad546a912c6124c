"""The whole of `bench all` on a CPU: as it is, on a bare machine, and with a fault planted in
each of several steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]

# Runs in every process of the command, before anything else.
PLANT = """
import errno, os, sys
step = sys.orig_argv[sys.orig_argv.index("step") + 1] if "step" in sys.orig_argv else ""
sync, calls = os.fsync, [0]

def fsync(descriptor):
    calls[0] += 1
    if step == "stream" and calls[0] == 3:
        os.kill(os.getpid(), 9)
    if step == "demo" and calls[0] > 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync(descriptor)

os.fsync = fsync
if step == "block":
    sys.modules["diffusers"] = None
if step == "correct":
    from lowvram_kernels import dispatch, ops
    wrapper = dispatch._wrapper

    def wrong(module, name):
        def run(x, out, out_scale, *, rotated):
            wrapper(module, name)(x, out, out_scale, rotated=rotated)
            out_scale.mul_(1.5)
        return run if name == "quantize_rows" else wrapper(module, name)

    dispatch._wrapper = wrong
if step == "tiles":
    from scripts import tune

    def tried(*arguments):
        raise RuntimeError("a planted fault")

    tune.tried = tried
"""
# Packages that a machine for measuring may lack.
BARE = (
    "av",
    "ftfy",
    "diffusers",
    "optimum",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "psutil",
    "typer",
    "rich",
    "msgspec",
)


def run(out: Path, *arguments: str, plant: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TRITON_INTERPRET", "LOWVRAM_BACKEND")
    }
    if plant:
        folder = out.parent / "plant"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(plant)
        environment["PYTHONPATH"] = str(folder)
    command = [
        sys.executable,
        "-m",
        "scripts.bench",
        "all",
        "--out",
        str(out),
        "--work",
        str(out.parent / "work"),
        *arguments,
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def lines(out: Path, words: Sequence[str]) -> dict[str, str]:
    page = (out / "page.md").read_text(encoding="utf-8").splitlines()
    return {word: next(line for line in page if line.startswith(f"| {word}")) for word in words}


def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = run(tmp_path / "out", "--rehearse")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert time.monotonic() - begin < 300, "two minutes where nothing else runs"
    found = lines(
        tmp_path / "out",
        ("machine", "correct", "speed", "block", "stream", "demo", "tiles", "more", "ncu"),
    )
    for step, line in found.items():
        assert "| done |" in line or (step == "ncu" and "ncu is not installed" in line), line
    for goal in (
        "every kernel agrees",
        "budgets change no bit of the latents",
        "no peak",
        "budgets change no bit of the demo",
    ):
        assert "| met |" in lines(tmp_path / "out", (goal,))[goal]
    assert (tmp_path / "out" / "demo.mp4").stat().st_size > 1000
    assert "A rehearsal on a CPU" in (tmp_path / "out" / "page.md").read_text(encoding="utf-8")
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())
    again = run(
        tmp_path / "again",
        "--rehearse",
        "--earlier",
        str(tmp_path / "out"),
        "--only",
        "speed",
        "block",
    )
    assert again.returncode == 0, again.stdout
    assert "lowvram int8: measured before" in again.stdout
    units = [
        json.loads(line)["unit"]
        for line in (tmp_path / "again" / "rows.jsonl").read_text().splitlines()
    ]
    assert all("SDPA" in unit or unit.startswith("a peer") for unit in units), (
        "only what did not run before is tried again"
    )


def test_a_fault_costs_its_step_alone(tmp_path: Path) -> None:
    steps = ("machine", "correct", "block", "stream", "demo", "tiles")
    done = run(tmp_path / "out", "--rehearse", "--only", *steps, plant=PLANT)
    assert done.returncode == 1
    found = lines(tmp_path / "out", steps)
    assert "| done |" in found["machine"]
    assert "| failed |" in found["correct"]
    assert "check quantize_rows: WrongKernelError: 5 of its calls disagree" in found["correct"]
    assert "1 of " in found["correct"]
    assert "| left out |" in found["block"]
    assert "not installed: diffusers" in found["block"]
    assert "| failed |" in found["stream"]
    assert "was killed (SIGKILL)" in found["stream"]
    assert "| failed |" in found["demo"]
    assert "the disk is full" in found["demo"]
    assert "| failed |" in found["tiles"]
    assert "a planted fault" in found["tiles"]
    goal = lines(tmp_path / "out", ("every kernel agrees",))["every kernel agrees"]
    assert "| missed | 6 of 7" in goal
    assert "quantize_rows, int8, rotated: out_scale" in goal


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bare", [True, False])
def test_without_a_gpu_every_step_says_so_and_none_a_traceback(tmp_path: Path, bare: bool) -> None:
    hidden = (
        f"import sys\nif 'step' in sys.orig_argv:\n    sys.modules.update(dict.fromkeys({BARE!r}))"
    )
    done = run(tmp_path / "out", plant=hidden if bare else "")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    page = (tmp_path / "out" / "page.md").read_text(encoding="utf-8")
    assert page.count("| no device |") == page.count("no CUDA device") == 9
    assert ("no CUDA device; not installed: diffusers, optimum, safetensors" in page) == bare
