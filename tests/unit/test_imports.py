"""Who may import whom (docs: import direction), what loads torch, and the constructs that the library does without."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "lowvram": ROOT / "lowvram",
    "lowvram_kernels": ROOT / "kernels" / "lowvram_kernels",
    "lowvram_quantize": ROOT / "quantize" / "lowvram_quantize",
}
BASE = {"errors", "config"}
STREAMING = BASE | {"checkpoint", "memory"}
MODELS = STREAMING | {"streaming", "lowvram_kernels"}
RUN = MODELS | {"models", "run", "progress"}
PIPELINE = RUN | {"sampling", "prompt", "prompt_cache", "prompt_features", "video"}
API = PIPELINE | {"pipeline", "lowvram_quantize"}
# Each part of the program -> the parts that it may import, beside itself; imports inside functions count too.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "disk": BASE,
    "progress": BASE,
    "prompt": BASE,
    "video": BASE | {"disk"},
    "prompt_cache": STREAMING | {"disk"},
    "checkpoint": BASE | {"disk"},
    "lowvram_quantize": BASE | {"checkpoint", "disk"},
    "lowvram_kernels": {"errors"},
    "memory": BASE | {"checkpoint", "disk", "lowvram_kernels"},
    "streaming": STREAMING | {"disk"},
    "models": MODELS,
    "run": STREAMING | {"streaming", "progress"},
    "sampling": RUN | {"disk"},
    "prompt_features": RUN | {"prompt", "prompt_cache"},
    "pipeline": PIPELINE,
    "planning": STREAMING | {"streaming"},
    "api": API | {"planning"},
    "lowvram": {"api"},
    "demo": API | {"api"},
    "terminal": API,
    "cli": API | {"planning", "demo", "terminal", "lowvram"},
    "__main__": {"cli"},
}
# Libraries that only some modules may import, so that the rest runs, loads fast and is understood without them.
ONLY_IN = {
    "triton": ("lowvram_kernels.", "lowvram.memory.machine"),
    "diffusers": ("lowvram.models.vae",),
    "transformers": (),
    "optimum": ("lowvram_quantize.", "lowvram.checkpoint."),
    "typer": ("lowvram.cli",),
    "av": ("lowvram.video", "lowvram.memory.probe"),
}
WITHOUT_TORCH = [
    "lowvram",
    "lowvram.errors",
    "lowvram.config",
    "lowvram.checkpoint.header",
    "lowvram.checkpoint.names",
    "lowvram.checkpoint.store_layout",
    "lowvram.memory.plan",
    "lowvram.memory.cards",
    "lowvram.memory.measure",
    "lowvram.memory.probe",
    "lowvram.streaming.forecast",
    "lowvram.planning",
    "lowvram.terminal",
    "lowvram.cli",
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


def part_of(module: str) -> str:
    """`lowvram.checkpoint.header` -> `checkpoint`; `lowvram_kernels.dispatch` -> `lowvram_kernels`; `lowvram` -> `lowvram`."""
    first, *rest = module.split(".")
    return rest[0] if first == "lowvram" and rest else first


def imports_of(module: str, source: str) -> Iterator[str]:
    """Names of all modules that it imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def violations(module: str, source: str) -> list[str]:
    part = part_of(module)
    out = []
    for imported in imports_of(module, source):
        root = imported.split(".")[0]
        if root in PACKAGES and part_of(imported) not in MAY_IMPORT[part] | {part}:
            out.append(f"{module} imports {imported}")
        if root in ONLY_IN and not f"{module}.".startswith(tuple(f"{place.rstrip('.')}." for place in ONLY_IN[root])):
            out.append(f"{module} imports {imported}")
    return out


def test_every_part_has_its_place() -> None:
    assert {part_of(module) for module in MODULES} <= set(MAY_IMPORT), "give the new part its row in MAY_IMPORT"
    assert {"checkpoint", "lowvram_kernels", "lowvram_quantize", "errors"} <= {part_of(module) for module in MODULES}


def test_the_allowed_imports_have_a_direction() -> None:
    """No part may reach itself: an order exists in which each imports only earlier ones."""
    left = {part: set(allowed) for part, allowed in MAY_IMPORT.items()}
    while free := [part for part, allowed in left.items() if not allowed & set(left)]:
        for part in free:
            del left[part]
    assert not left


def test_imports_follow_the_direction() -> None:
    broken = [line for module, path in MODULES.items() for line in violations(module, path.read_text(encoding="utf-8"))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowvram.config", "import lowvram.checkpoint.header"),
        ("lowvram_quantize.convert", "def f():\n    from lowvram.models import wan"),
        ("lowvram_quantize.int8", "import triton.language as tl"),
        ("lowvram_kernels.dispatch", "from lowvram.config import Request"),
        ("lowvram.memory.plan", "from lowvram.streaming.ring import Ring"),
        ("lowvram.pipeline", "from lowvram.cli import main"),
        ("lowvram.models.wan", "import diffusers"),
        ("lowvram.prompt", "from transformers import T5Tokenizer"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, source: str) -> None:
    assert violations(module, source)


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


@pytest.mark.parametrize(("arguments", "told"), [(["--help"], "generate"), (["plan", "t2v-a14b", "--size", "832x480"], "denoise")])
def test_help_and_plans_load_neither_torch_nor_triton(arguments: list[str], told: str, tmp_path: Path) -> None:
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
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout


def matches(pattern: str) -> list[str]:
    return [module for module, path in MODULES.items() if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)]


def test_p13_pickle_is_read_in_one_file() -> None:
    reader = ["lowvram.checkpoint.pickle_import"]
    assert matches(r"torch\.load\(") == reader
    assert matches(r"^\s*(import|from) (_?pickle|dill|cloudpickle|torch\.serialization)\b") in ([], reader)


@pytest.mark.parametrize(
    "pattern", [r"^\s*except\s*:", r"^\s*assert\b", r"make_block_ptr", r"except (Base)?Exception[^:]*:\s*pass\b", r"\bTODO\b"]
)
def test_the_library_does_without(pattern: str) -> None:
    assert matches(pattern) == []
