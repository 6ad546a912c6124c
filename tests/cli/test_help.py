"""The help of every command: what it shows in 80 columns, and that its defaults are true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from lowvram.cli.app import app
from lowvram.variants import VARIANTS

COMMANDS = ["demo", "quantize", "generate", "plan", "inspect", "doctor"]


def help_of(*command: str) -> str:
    environment = os.environ | {
        "COLUMNS": "80",
        "TERM": "dumb",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    return subprocess.run(
        [sys.executable, "-m", "lowvram", *command, "--help"],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_names_of_options_are_whole_in_80_columns(command: list[str]) -> None:
    text = help_of(*command)
    assert max(map(len, text.splitlines())) <= 80
    options = re.findall(r"^│ (?:\* +)?(--\S+)", text, re.MULTILINE)
    assert options
    assert not [option for option in options if option.endswith("…")]


def test_the_defaults_in_the_help_are_those_of_the_model() -> None:
    text = re.sub(r"[│\s]+", " ", help_of("generate"))
    sampling = VARIANTS["t2v-a14b"].config.sampling
    values = {
        "--size": f"{sampling.width}x{sampling.height}",
        "--frames": sampling.num_frames,
        "--steps": sampling.steps,
        "--shift": sampling.shift,
        "--guidance-high": sampling.guidance_high,
        "--guidance-low": sampling.guidance_low,
    }
    for option, value in values.items():
        shown = re.search(rf" {option}\b.*?Default of A14B: (\S+)\.", text)
        assert shown, option
        assert shown[1] == (f"{value:g}" if isinstance(value, float) else str(value))


@pytest.mark.parametrize("name", ["quantize", "generate", "plan"])
def test_the_example_has_options_that_exist(name: str) -> None:
    text = re.sub(r"\s+", " ", help_of(name))
    words = shlex.split(text.split("Example: lowvram ")[1])
    assert words[0] == name
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words[1:])
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
