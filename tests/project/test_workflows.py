"""The workflows for a public forge parse, and call commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import bootstrap

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: dict[Any, Any]) -> list[str]:
    """The shell commands of all jobs."""
    jobs = workflow["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_commands_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    commands = "\n".join(steps(workflow))
    called = re.findall(r"bootstrap\.py(?: --torch-index \S+)? (\w+)", commands)
    assert set(called) <= set(bootstrap.COMMANDS)
    assert len(called) == commands.count("bootstrap.py")
    for folder in re.findall(r"--ignore (\S+)", commands):
        assert (ROOT / folder).is_dir()


def test_lint_types_contracts_and_all_pythons_are_covered() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = " ".join(steps(workflow))
    for command in ("lint", "format", "type", "contracts"):
        assert f"bootstrap.py {command}" in commands
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
