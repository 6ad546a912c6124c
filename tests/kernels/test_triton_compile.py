"""Compiles every kernel for every architecture and tests each gate of that check."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_kernels import constraints, tuning

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None or sys.platform != "linux",
        reason="triton compiles on Linux alone",
    ),
]

BAD = """
import dataclasses, importlib.util, pathlib, sys
from scripts import compile_kernels as check

def variant(name, arch):
    return next(item for item in check.variants(arch) if item.name == name)

store = variant("linear int8 store", "sm_86")
wide = dataclasses.replace(store, constants=store.constants | {{"BLOCK_M": 256}}, options=store.options | {{"num_stages": 3}})
for fault in check.compiled(wide, "sm_86").faults:
    print(fault)
for name, arch, unaligned in (
    ("linear int8 store", "sm_86", tuple(store.kernel.arg_names)),
    ("linear int8 += gate * y", "sm_90", ("stride_w",)),
    ("attention int8", "sm_90", ("stride_vh", "stride_vd")),
    ("attention int8", "gfx1100", ("stride_vh", "stride_vd")),
):
    print("narrow", name, arch, check.compiled(variant(name, arch), arch, unaligned).faults)
for name, arch in (("linear int8 store", "sm_86"), ("linear int8 gelu", "sm_86"), ("linear int8 gelu", "gfx1100")):
    one = variant(name, arch)
    fused = dataclasses.replace(one, options=one.options | {{"enable_fp_fusion": True}})
    print("fused", name, arch, check.compiled(fused, arch).faults)

# Attention in int8 that adds up probabilities and values instead of multiplying them: its other product is one of int8 too.
source = pathlib.Path(sys.modules[check.attention_kernel.fn.__module__].__file__).read_text(encoding="utf-8")
product = "tl.dot(codes, tl.trans(tl.load(v_ptrs)), start, out_dtype=tl.int32)"
assert source.count(product) == 1
lost = pathlib.Path({folder!r}) / "lost.py"
lost.write_text(source.replace(product, "start + tl.sum(codes.to(tl.int32), axis=1)[:, None]"), encoding="utf-8")
spec = importlib.util.spec_from_file_location("lost", lost)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for arch in ("sm_86", "sm_90", "gfx1100"):
    print("lost", arch, check.compiled(dataclasses.replace(variant("attention int8", arch), kernel=module.attention_kernel), arch).faults)
print(check.faults(store, "sm_86", 0, 100 * 1024, {{}}, 1, 16, 0))
print(check.faults(variant("attention fp16", "sm_86"), "sm_86", 0, 0, {{"int8": 1 << 30}}, 4, 16, 0))
"""

# Records the integer arguments of every kernel launch of one A14B step, without a GPU.
REAL = """
import sys
from types import SimpleNamespace
from scripts import compile_kernels as check
import torch
from lowvram.models import numerics
from lowvram_kernels import adaln_quantize_triton, attention_int8_triton, quantize_rows_triton
from lowvram_kernels import quantize_values_triton, quantized_linear_triton, rms_rope_quantize_triton

OPS = ("adaln_quantize", "attention_int8", "gelu_quantize", "quantize_rows", "quantize_values", "quantized_linear", "rms_rope_quantize")
seen = {{}}

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            for name, value in zip(self.kernel.arg_names, arguments):
                if isinstance(value, int):
                    seen.setdefault((self.kernel, name), set()).add(value)
        return launch

numerics.ops, numerics.pv_dtype = SimpleNamespace(), lambda device: torch.int8
for module in (adaln_quantize_triton, attention_int8_triton, quantize_rows_triton, quantize_values_triton, quantized_linear_triton, rms_rope_quantize_triton):
    module.architecture = lambda device: "sm_90"
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Recorder(getattr(module, name)))
    for name in OPS:
        if callable(vars(module).get(name)):
            setattr(numerics.ops, name, getattr(module, name))

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

D, F, H, W = check.DIM, check.FFN, check.HEADS, check.HEAD_DIM
step = numerics.QuantizedNumerics("int8", H, W, 1e-6, SimpleNamespace(view=lambda name, shape, dtype: meta(*shape, dtype=dtype)))
for tokens in (32760, 75600, 512):
    memory = step.attention_memory("", tokens)
    for start in range(0, tokens, 8192):
        rows = min(8192, tokens - start)
        x, both, stream = meta(rows, D, dtype=torch.bfloat16), meta(rows, 2 * D, dtype=torch.bfloat16), meta(rows, D)
        queries, rope = step.queries(rows), (meta(rows, W // 2), meta(rows, W // 2))
        step.heads(x, meta(D), rope, None, queries)
        step.heads(both[:, :D], meta(D), rope, meta(H, W), memory.key_rows(start, start + rows))
        step.values(both[:, D:], memory, start)
        step.attend(queries, memory, x)
        step.modulated(stream, meta(D), meta(D), "project.rows")
        step.rows(x, "attend.rows")
        step.gelu(meta(rows, F, dtype=torch.bfloat16), "ffn.hidden_rows")
        for k, n in ((D, 2 * D), (D, D), (D, F), (F, D)):
            a, weight = meta(rows, k, dtype=torch.int8), meta(n, k, dtype=torch.int8)
            numerics.ops.quantized_linear(a, meta(rows, 1), weight, meta(n, 1), meta(n), meta(rows, n, dtype=torch.bfloat16))
print(len({{kernel for kernel, name in seen}}), "kernels", len(seen), "integers")
for (kernel, name), values in sorted(seen.items(), key=str):
    found = 0 if values == {{1}} else 16 if all(value % 16 == 0 for value in values) else 1
    free = kernel.params[kernel.arg_names.index(name)].do_not_specialize
    if found != check.known(kernel, name) and not free:
        print("differs:", kernel.fn.__name__, name, sorted(values), check.known(kernel, name))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_within_the_limits_of(target: str) -> None:
    result = run("-m", "scripts.compile_kernels", "--arch", target)
    assert result.returncode == 0, result.stdout + result.stderr
    names = [
        "adaln int8 rotated",
        "gelu int8 rotated",
        "rows fp8",
        "rms_rope k",
        "linear int8 += gate * y",
        "linear int8 gelu",
    ]
    names += [f"{name} {pv}" for name in ("values", "attention") for pv in ("int8", "fp16")]
    names += (
        ["attention fp8", "attention fp8, heads of 64"]
        if target in ("sm_89", "sm_90", "sm_120")
        else []
    )
    names += [
        "demo's rows int8 rotated",
        "demo's gelu int8 rotated",
        "demo's rms_rope k",
        "values int8, heads of 64",
    ]
    names += (
        ["linear int8 += gate * y, ragged K", "linear int8 store, fp32", "attention int8, fp32"]
        if target in ("sm_86", "sm_90")
        else []
    )
    for name in names:
        assert f"| {name} | {target} |" in result.stdout


def test_spills_narrow_loads_fused_sums_shared_memory_and_missing_instructions_are_faults(
    tmp_path: Path,
) -> None:
    result = run("-c", BAD.format(folder=str(tmp_path)))
    assert result.returncode == 0, result.stderr
    assert "bytes spilled" in result.stdout
    assert "of shared memory, the limit is 99 KB" in result.stdout
    for planted, count, fault in (
        ("narrow", 4, "operands are loaded"),
        ("fused", 3, "fused multiply-adds"),
        ("lost", 3, "products in matrix instructions"),
    ):
        lines = [line for line in result.stdout.splitlines() if line.startswith(planted)]
        assert len(lines) == count
        assert all(fault in line for line in lines), lines
    lost = [line for line in result.stdout.splitlines() if line.startswith("lost sm_")]
    assert all("int8 matrix instructions for" in line for line in lost), lost
    assert "no int8 matrix instruction" in result.stdout
    assert "no fp16 matrix instruction" in result.stdout


def test_the_compiler_is_told_what_it_knows_at_the_shapes_of_a14b() -> None:
    result = run("-c", REAL.format())
    assert result.returncode == 0, result.stderr
    assert "6 kernels" in result.stdout
    assert "differs" not in result.stdout, result.stdout


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (11, 0), (13, 0)])
def test_a_capability_without_a_row_is_refused_with_a_reason(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(constraints, "broken_triton", lambda: None)
    index = 10 * (capability[0] - 10) + capability[1]  # reasons are cached per device
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    reason = constraints.wrong_device(tensor)
    assert (
        reason == f"no tiles for compute capability {capability[0]}.{capability[1]}: supported are "
        f"8.x, 9.x and 12.x"
    )
    assert tuning.nvidia_row((12, 1)) == tuning.nvidia_row((12, 0)) == "sm_120"
