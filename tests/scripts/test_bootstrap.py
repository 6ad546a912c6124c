"""The bootstrap script: what it needs, when it installs, what it hands on. Nothing here touches the
real environment.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeRuns:
    """Stands in for `run`: records each command and makes the python that `venv` would make."""

    def __init__(self, python: Path, fails: str = "") -> None:
        self.python, self.fails = python, fails
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command[1:3])
        if command[1:3] == ["-m", "venv"]:
            self.python.parent.mkdir(parents=True)
            self.python.touch()
        return int(self.fails in command) if self.fails else 0


@pytest.fixture
def runs(bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns(bootstrap.python_of(tmp_path / "venv"))
    monkeypatch.setattr(bootstrap, "run", fake)
    monkeypatch.setattr(bootstrap, "works", Path.is_file)
    return fake


VENV, PIP = ["-m", "venv"], ["-m", "pip"]


def test_needs_the_standard_library_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_an_old_python_is_told_so(bootstrap: ModuleType) -> None:
    bootstrap.check_python((3, 10))
    with pytest.raises(bootstrap.BootstrapError, match=r"Python 3\.9, lowvram needs 3\.10"):
        bootstrap.check_python((3, 9))


def test_an_environment_is_made_once(bootstrap: ModuleType, runs: FakeRuns, tmp_path: Path) -> None:
    for _ in range(3):
        assert bootstrap.make_environment(None, tmp_path / "venv") == runs.python
    assert runs.commands == [VENV, PIP]


def test_an_unfinished_environment_is_completed(
    bootstrap: ModuleType, runs: FakeRuns, tmp_path: Path
) -> None:
    runs.python.parent.mkdir(parents=True)
    runs.python.touch()
    bootstrap.make_environment(None, tmp_path / "venv")
    assert runs.commands == [PIP]


def test_a_failed_installation_is_tried_again(
    bootstrap: ModuleType, runs: FakeRuns, tmp_path: Path
) -> None:
    runs.fails = "pip"
    for _ in range(2):
        with pytest.raises(bootstrap.BootstrapError, match="pip failed"):
            bootstrap.make_environment(None, tmp_path / "venv")
    assert runs.commands == [VENV, PIP, PIP]


def test_other_requirements_are_installed(
    bootstrap: ModuleType, runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.make_environment(None, tmp_path / "venv")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("one")
    for content in ("one", "one", "two", "two"):
        (tmp_path / "constraints.txt").write_text(content)
        bootstrap.make_environment(None, tmp_path / "venv")
    assert runs.commands == [VENV, PIP, PIP, PIP]


def test_another_torch_index_is_installed_and_then_kept(
    bootstrap: ModuleType, runs: FakeRuns, tmp_path: Path
) -> None:
    for index in (
        None,
        "https://example.org/cpu",
        None,
        "https://example.org/cpu",
        "https://example.org/cuda",
    ):
        bootstrap.make_environment(index, tmp_path / "venv")
    assert runs.commands == [VENV, PIP, PIP, PIP]


def test_a_broken_python_is_noticed(bootstrap: ModuleType, tmp_path: Path) -> None:
    assert bootstrap.works(Path(sys.executable))
    assert not bootstrap.works(tmp_path / "missing")
    (tmp_path / "text").write_text("no program")
    assert not bootstrap.works(tmp_path / "text")


def test_arguments_and_exit_status_are_handed_on(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "make_environment", lambda index: Path("python"))

    def run(command: list[str]) -> int:
        seen.append(command)
        return 7

    monkeypatch.setattr(bootstrap, "run", run)
    assert bootstrap.main(["demo", "--out", "a b.mp4"]) == 7
    assert bootstrap.main(["run", "--help"]) == 7
    assert bootstrap.main(["setup"]) == 0
    assert seen == [
        ["python", "-m", "lowvram", "demo", "--out", "a b.mp4"],
        ["python", "-m", "lowvram", "--help"],
    ]


def test_advice_on_torch_where_pypi_has_the_wrong_build(
    bootstrap: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for system, has_gpu, word in (
        ("linux", False, "CPU index"),
        ("win32", True, "CUDA index"),
        ("linux", True, ""),
        ("darwin", False, ""),
    ):
        bootstrap.advise_on_torch(system, has_gpu)
        said = capsys.readouterr().err
        assert word in said
        assert bool(word) == bool(said)


def test_wrong_usage_lists_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "dance"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "lint" in done.stderr


def test_constraints_pin_every_direct_requirement() -> None:
    pins = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib.metadata as m; print(*m.requires('lowvram') or [], sep='\\n')",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    names = {canonicalize_name(Requirement(line).name) for line in wanted}
    assert {"torch", "pytest"} <= names
    assert names <= pins
