"""Every command and every block of Python in the README runs, on the demo model and at its size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "lowvram" / "demo" / "model"
# What stands for the real model and its sizes here.
SMALL = {
    "Wan2.2-T2V-A14B": str(DEMO),
    "832x480": "64x64",
    "(832, 480)": "(64, 64)",
    "--size 64x64 --vram 8GiB --ram 16GiB": "--size 64x64 --vram 2GiB --ram 4GiB",
    'vram="8GiB", ram="16GiB"': 'vram="2GiB", ram="4GiB"',
    "--frames 33 --steps 30": "--frames 9 --steps 2",
}
# Commands that another test runs, or that need a network: why.
ELSEWHERE = {
    "python scripts/bootstrap.py test": "this run itself; tests/scripts/test_bootstrap.py",
    "python scripts/bootstrap.py demo": "tests/scripts/test_bootstrap.py and `lowvram demo` below",
    "pip install -e . -c constraints.txt": "scripts/bootstrap.py installs so in CI",
    "hf download Wan-AI/Wan2.2-T2V-A14B --local-dir Wan2.2-T2V-A14B": "needs a network",
    "python -m scripts.bench all --out FOLDER": "tests/scripts/bench/test_rehearsal.py",
    "python -m scripts.bench all --rehearse --out FOLDER": "tests/scripts/bench/test_rehearsal.py",
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The command lines of all shell blocks, without their comments."""
    lines = "".join(blocks("sh")).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def small(text: str) -> str:
    """The text with the demo model and its sizes."""
    for real, stand_in in SMALL.items():
        text = text.replace(real, stand_in)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder, where the commands run one after the other as a reader types them."""
    return tmp_path_factory.mktemp("readme")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "quantize"))
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "LOWVRAM_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_command_runs(folder: Path) -> None:
    ran = [command for command in commands() if command not in ELSEWHERE]
    assert {shlex.split(command)[0] for command in ran} == {"lowvram"}
    assert {shlex.split(command)[1] for command in ran} == {
        "doctor",
        "quantize",
        "generate",
        "plan",
        "inspect",
        "demo",
    }
    for command in ran:
        done = run(folder, "-m", *shlex.split(small(command)))
        # `doctor` ends with 1 where something is missing, such as a GPU.
        assert done.returncode == 0 or command == "lowvram doctor", command + done.stderr
        assert "Traceback" not in done.stderr, command + done.stderr
    assert (folder / "clip.mp4").stat().st_size > 1000
    assert (folder / "demo.mp4").stat().st_size > 1000


def test_what_runs_elsewhere_stands_in_the_readme() -> None:
    assert set(ELSEWHERE) <= set(commands())


@pytest.mark.slow
def test_every_block_of_python_runs(tmp_path: Path) -> None:
    found = blocks("python")
    assert found
    for block in found:
        done = run(tmp_path, "-c", small(block))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "clip.mp4").stat().st_size > 1000


def test_pictures_and_links_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert "docs/images/demo.gif" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
