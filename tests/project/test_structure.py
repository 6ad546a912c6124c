"""docs/structure.md names every module once, and no module that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    ROOT / "lowvram",
    ROOT / "kernels" / "lowvram_kernels",
    ROOT / "quantize" / "lowvram_quantize",
    ROOT / "scripts",
)


def test_every_module_has_its_sentence() -> None:
    modules = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in package.rglob("*.py")
    }
    named = re.findall(
        r"^\| `([^`]+\.py)` \| \S",
        (ROOT / "docs" / "structure.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(named) == len(set(named))
    wanted = {module for module in modules if not module.endswith("__init__.py")}
    assert wanted == set(named), (
        f"missing {sorted(wanted - set(named))}, gone {sorted(set(named) - wanted)}"
    )
