"""Every kernel compiles for every architecture within its limits, and each gate of that check fails where it should."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compile_kernels.py"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None or sys.platform != "linux", reason="triton compiles on Linux alone"),
]

BAD = """
import dataclasses, sys
sys.path.insert(0, {scripts!r})
import compile_kernels as check

def variant(name, arch):
    return next(item for item in check.variants(arch) if item.name == name)

store = variant("linear int8 store", "sm_86")
wide = dataclasses.replace(store, constants=store.constants | {{"BLOCK_M": 256}}, options=store.options | {{"num_stages": 3}})
for fault in check.compiled(wide, "sm_86").faults + check.compiled(store, "sm_86", alignment=1).faults:
    print(fault)
for name, arch in (("linear int8 store", "sm_86"), ("linear int8 gelu", "sm_86"), ("linear int8 gelu", "gfx1100")):
    one = variant(name, arch)
    fused = dataclasses.replace(one, options=one.options | {{"enable_fp_fusion": True}})
    print("fused", name, arch, check.compiled(fused, arch).faults)
print(check.faults(store, "sm_86", 0, 100 * 1024, "", 16, 0))
print(check.faults(variant("attention fp16", "sm_86"), "sm_86", 0, 0, "mma.m16n8k32.s32.s8.s8.s32", 16, 0))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_within_the_limits_of(target: str) -> None:
    result = run(str(SCRIPT), "--arch", target)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["adaln int8 rotated", "gelu int8 rotated", "rows fp8", "rms_rope k", "linear int8 += gate * y", "linear int8 gelu"]
    names += [f"{name} {pv}" for name in ("values", "attention") for pv in ("int8", "fp16")]
    names += ["attention fp8", "attention fp8, heads of 64"] if target in ("sm_89", "sm_90", "sm_120") else []
    for name in names:
        assert f"| {name} | {target} |" in result.stdout


def test_spills_narrow_loads_fused_sums_shared_memory_and_missing_instructions_are_faults() -> None:
    result = run("-c", BAD.format(scripts=str(SCRIPT.parent)))
    assert result.returncode == 0, result.stderr
    assert "bytes spilled" in result.stdout
    assert "operands are loaded" in result.stdout
    assert "of shared memory, the limit is 99 KB" in result.stdout
    fused = [line for line in result.stdout.splitlines() if line.startswith("fused")]
    assert len(fused) == 3
    assert all("fused multiply-adds" in line for line in fused), fused
    assert "no int8 matrix instruction" in result.stdout
    assert "no fp16 matrix instruction" in result.stdout
