"""The examples run, on the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram.demo.run import MODEL

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: object) -> str:
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "quantize"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_planned() -> None:
    assert "minutes, predicted" in run("plan.py")


@pytest.mark.slow
def test_a_checkpoint_becomes_a_video(tmp_path: Path) -> None:
    assert "became" in run("quantize.py", MODEL, tmp_path / "model")
    clip = tmp_path / "clip.mp4"
    # The budgets of the example are more than some machines have: those of this test are auto.
    example = (ROOT / "examples" / "generate.py").read_text(encoding="utf-8")
    assert 'vram="8GiB", ram="16GiB"' in example
    code = example.replace('vram="8GiB", ram="16GiB"', 'vram="auto", ram="auto"')
    (tmp_path / "generate.py").write_text(code, encoding="utf-8")
    prompt = "a red circle moves right on a white background"
    said = run(str(tmp_path / "generate.py"), tmp_path / "model", prompt, clip)
    assert said == f"9 frames in {clip}\n"
    assert clip.stat().st_size > 1000
