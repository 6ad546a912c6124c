"""Compiles the GEMM and attention with the oldest and newest supported Triton.

Also checks that all documents name the same range of versions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from lowvram_kernels import constraints
from lowvram_kernels.constraints import NEWEST_TRITON, OLDEST_TRITON

from lowvram.hardware import machine as machine_module

ROOT = Path(__file__).parents[2]
ENDS = ("3.6.0", "3.9.0")


def installed(version: str) -> Path:
    """Return a folder with this Triton alone; it is kept in build/ for the next run."""
    folder = ROOT / "build" / f"triton-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            f"{made}/triton",
            f"triton=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = f"pip cannot install triton {version}: {done.stderr[-500:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        shutil.move(f"{made}/triton", folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux alone")
@pytest.mark.parametrize("version", ENDS)
def test_kernels_compile_with_both_ends_of_the_range(version: str) -> None:
    """Gates: no spill, 16-byte copies, matrix instructions, no fused sum in an int8 linear."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [
        str(installed(version)),
        *(str(ROOT / folder) for folder in (".", "kernels", "quantize")),
    ]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "compile_kernels.py"),
        "--kernel",
        "linear",
        "attention",
        "--jobs",
        "2",
    ]
    # sm_86 is left out: it is sm_89 without e4m3
    command += ["--arch", "sm_80", "sm_89", "sm_90", "sm_120", "gfx1100"]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"with Triton {version}, 0 faults" in done.stdout


def test_the_ends_are_those_of_the_range() -> None:
    assert [tuple(map(int, version.split(".")[:2])) for version in ENDS] == [
        OLDEST_TRITON,
        NEWEST_TRITON,
    ]


def test_all_documents_name_the_same_range() -> None:
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST_TRITON, NEWEST_TRITON))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\"triton>={oldest}; sys_platform == 'linux'\"" in project
    assert f"\"triton-windows>={oldest}; sys_platform == 'win32'\"" in project
    torch = re.search(r'"torch>=([\d.]+)"', project)
    assert torch is not None
    for name in ("README.md", "docs/benchmarks/kernels.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        assert f"Triton {oldest} to {newest}" in text, name
    assert f"torch {torch[1]} or later" in " ".join(
        (ROOT / "README.md").read_text(encoding="utf-8").split()
    )
    pinned = dict(
        re.findall(
            r"^(triton|triton-windows)==(\d+\.\d+)",
            (ROOT / "constraints.txt").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    assert set(pinned) == {"triton", "triton-windows"}
    assert len(set(pinned.values())) == 1


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Installed packages: name -> version."""
    packages: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in packages:
            raise PackageNotFoundError(package)
        return packages[package]

    for function in (constraints.triton_release, constraints.no_triton):
        function.cache_clear()
    monkeypatch.setattr(constraints, "version", version)
    monkeypatch.setattr(machine_module, "version", version)
    monkeypatch.setattr(constraints, "find_spec", lambda name: object())
    yield packages
    for function in (constraints.triton_release, constraints.no_triton):
        function.cache_clear()


def test_an_old_triton_is_refused_by_name(triton: dict[str, str]) -> None:
    triton["triton"] = "3.5.1"
    assert constraints.no_triton() == "Triton 3.5 is too old: 3.6 or later is needed"
    assert (
        machine_module.why_triton_fails(has_gpu=True)
        == "Triton 3.5 is too old: 3.6 or later is needed"
    )


@pytest.mark.parametrize(
    ("package", "version", "note"),
    [
        ("triton", "3.6.0", ""),
        ("triton-windows", "3.8.0.post29", ""),
        ("pytorch-triton-rocm", "3.9.1", ""),
        (
            "triton",
            "3.10.0",
            "newer than Triton 3.9, the newest that the kernels were compiled with",
        ),
        ("triton", "4.0.0+git1", "newer than Triton 3.9"),
        ("unheard-of", "9.9", ""),
    ],
)
def test_a_new_triton_is_used_and_said_to_be_new(
    package: str, version: str, note: str, triton: dict[str, str]
) -> None:
    triton[package] = version
    assert constraints.no_triton() is None
    said = machine_module.triton_note()
    assert said.startswith(note)
    assert bool(said) == bool(note)


def test_tritons_version_is_found_under_each_of_its_names(triton: dict[str, str]) -> None:
    triton["triton-windows"] = "3.7.1.post27"
    assert machine_module._version("triton") == "3.7.1.post27"
