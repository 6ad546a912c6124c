"""The contracts of imports, what loads torch, and the constructs that the library does without."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "lowvram": ROOT / "lowvram",
    "lowvram_kernels": ROOT / "kernels" / "lowvram_kernels",
    "lowvram_quantize": ROOT / "quantize" / "lowvram_quantize",
}
WITHOUT_TORCH = [
    "lowvram",
    "lowvram.errors",
    "lowvram.units",
    "lowvram.variants",
    "lowvram.formats",
    "lowvram.request",
    "lowvram.checkpoint.readers.safetensors_header",
    "lowvram.checkpoint.names",
    "lowvram.store.layout",
    "lowvram.planner.plan",
    "lowvram.timing.cards",
    "lowvram.doctor.measure",
    "lowvram.doctor.report",
    "lowvram.timing.forecast",
    "lowvram.plans.api",
    "lowvram.cli.progress",
    "lowvram.cli.plan_tables",
    "lowvram.cli.report_tables",
    "lowvram.cli.app",
]


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml on the packages below `root`."""
    paths = os.pathsep.join(str(root / folder) for folder in (".", "kernels", "quantize"))
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command; "
        "sys.exit(lint_imports_command())",
    ]
    return subprocess.run(
        [*command, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("", "", ""),
        ("lowvram/units.py", "import lowvram.checkpoint.names", "Rooms of lowvram import one way"),
        (
            "lowvram/planner/plan.py",
            "from lowvram.streaming.slots import Slots",
            "Rooms of lowvram import one way",
        ),
        (
            "lowvram/pipeline.py",
            "def late():\n    from lowvram.cli.app import main",
            "Rooms of lowvram import one way",
        ),
        (
            "kernels/lowvram_kernels/dispatch.py",
            "from lowvram.request import Request",
            "The kernels know nothing of lowvram",
        ),
        (
            "quantize/lowvram_quantize/convert.py",
            "from lowvram.models import wan",
            "The quantizer stands on checkpoints and the store",
        ),
        ("lowvram/models/wan.py", "import diffusers", "Libraries that only some modules import"),
        (
            "lowvram/prompt/tokenizer.py",
            "from transformers import T5Tokenizer",
            "Libraries that only some modules import",
        ),
    ],
    ids=[
        "as it is",
        "base",
        "planner",
        "pipeline",
        "kernels",
        "quantizer",
        "diffusers",
        "transformers",
    ],
)
def test_imports_follow_the_contracts_and_a_wrong_one_breaks_them(
    module: str, line: str, contract: str, tmp_path: Path
) -> None:
    for name, folder in PACKAGES.items():
        target = tmp_path / folder.relative_to(ROOT)
        shutil.copytree(
            folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
        assert target.name == name
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module:
        with open(tmp_path / module, "a", encoding="utf-8") as file:
            file.write(f"\n\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == (1 if module else 0), done.stdout + done.stderr
    assert (f"{contract} BROKEN" in done.stdout) == bool(module), done.stdout


def test_no_import_is_relative() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                f"{module} line {node.lineno}"
            )


def test_torch_and_triton_load_late() -> None:
    code = f"""
import importlib, sys
for name in {WITHOUT_TORCH!r}:
    importlib.import_module(name)
    for heavy in ("torch", "triton", "diffusers"):
        if heavy in sys.modules:
            sys.exit(f"importing {{name}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--help"], "generate"), (["plan", "t2v-a14b", "--size", "832x480"], "denoise")],
)
def test_help_and_plans_load_neither_torch_nor_triton(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    """Where no machine profile is cached; with one, torch is asked which machine this is."""
    code = f"""
import runpy, sys
sys.argv = ["lowvram", *{arguments!r}]
try:
    runpy.run_module("lowvram", run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "triton"}} & set(sys.modules)
    sys.exit(f"it loads {{heavy}}" if heavy else end.code)
"""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "LOCALAPPDATA": str(tmp_path),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def matches(pattern: str) -> list[str]:
    return [
        module
        for module, path in MODULES.items()
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_p13_pickle_is_read_in_one_file() -> None:
    reader = ["lowvram.checkpoint.readers.pickle"]
    assert matches(r"torch\.load\(") == reader
    assert matches(r"^\s*(import|from) (_?pickle|dill|cloudpickle|torch\.serialization)\b") in (
        [],
        reader,
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\s*except\s*:",
        r"^\s*assert\b",
        r"make_block_ptr",
        r"except (Base)?Exception[^:]*:\s*pass\b",
        r"\bTODO\b",
    ],
)
def test_the_library_does_without(pattern: str) -> None:
    assert matches(pattern) == []
