"""Compiles every Triton kernel and variant for six architectures on a machine that has none of them, and gates what comes out.

    python scripts/compile_kernels.py [--arch sm_89 ...] [--kernel attention ...] [--csv FILE]

Prints a table of registers, spilled bytes, shared memory, matrix instructions and the narrowest load of the main operands. Exits 1 where a
GEMM or attention kernel spills, has no matrix instruction of the expected type or loads its operands in less than 16 bytes, where the
machine code of an int8 linear holds a fused multiply-add (its bits would not be the reference's), and where any kernel needs more shared
memory than the architecture gives. Loads are known to be aligned as they are at run time: pointers, strides and
K divisible by 16.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None):
    print("compile_kernels: TRITON_INTERPRET is ignored, kernels are compiled", file=sys.stderr)

import triton
from lowvram_kernels import tuning
from lowvram_kernels.adaln_quantize_triton import adaln_kernel
from lowvram_kernels.attention_int8 import VALUE_MAX
from lowvram_kernels.attention_int8_triton import attention_kernel, values_kernel
from lowvram_kernels.quantize_rows_triton import groups_of, rows_kernel
from lowvram_kernels.quantized_linear_triton import linear_kernel
from lowvram_kernels.rms_rope_quantize_triton import rms_rope_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99, "gfx1100": 64}  # KB that one program may use
NOT_ALIGNED = {"M", "H", "eps", "softmax_scale", "stride_cos"}  # every other argument is divisible by 16
CODE_TYPES = {"int8": "*i8", "fp8": "*fp8e4nv", "decode": "*u8"}
VALUE_TYPES = {"int8": "*i8", "fp16": "*fp16", "fp8": "*u8"}  # as the values are stored
DIM, HEADS, HEAD_DIM, FFN = 5120, 40, 128, 13824


@dataclass(frozen=True)
class Variant:
    """One specialization: the types of its arguments, its constants and launch options, and what is expected of it."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    matrix: tuple[str, ...] = ()  # keys of MATRIX: what its matrix instructions multiply
    operand_bytes: int = 0  # of the main operands, per step of the loop
    scale_loads: int = 0  # narrow asynchronous loads per stage that are no main operand
    unfused: bool = False  # multiplies and adds as its reference does, bit for bit


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    arch: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: str
    narrowest_load_bytes: int
    seconds: float
    faults: list[str] = field(default_factory=list)


def variants(arch: str) -> Iterator[Variant]:
    yield from linear_variants(arch)
    yield from row_variants()
    yield from attention_variants(arch)


def linear_variants(arch: str) -> Iterator[Variant]:
    floats = dict.fromkeys(("a_scale_ptr", "w_scale_ptr", "bias_ptr", "gate_ptr"), "*fp32")
    sizes = dict.fromkeys(("M", "N", "K", "stride_a", "stride_w", "stride_out"), "i32")
    for int8 in (True, False):
        kind = tuning.linear_kind(arch, int8)
        for label, gelu, accumulate, gate, even in (
            ("store", False, False, False, True),
            ("store, ragged K", False, False, False, False),
            ("gelu", True, False, False, True),
            ("+= y", False, True, False, True),
            ("+= gate * y", False, True, True, True),
        ):
            tile = tuning.linear_tile(arch, kind, plain=not accumulate and not gelu)
            codes = CODE_TYPES[kind]
            types = floats | sizes | {"a_ptr": codes, "w_ptr": codes, "out_ptr": "*fp32" if accumulate else "*bf16"}
            constants = {
                "HAS_BIAS": True, "GELU": gelu, "HAS_GATE": gate, "ACCUMULATE": accumulate, "INT8": int8, "DECODE": kind == "decode",
                "EVEN_K": even, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": 8,
            }  # fmt: skip
            options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
            operands = (tile.block_m + tile.block_n) * tile.block_k
            yield Variant(f"linear {kind} {label}", linear_kernel, types, constants, options, (kind,), operands, unfused=int8)


def row_variants() -> Iterator[Variant]:
    for rotated, e4m3 in ((True, False), (False, False), (False, True)):
        label = ("int8" if not e4m3 else "fp8") + (" rotated" if rotated else "")
        out = "*i32" if rotated else "*u8" if e4m3 else "*i8"
        types = {"x_ptr": "*bf16", "out_ptr": out, "out_scale_ptr": "*fp32", "K": "i32", "stride_x": "i32", "stride_out": "i32"}
        modulation = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "shift_ptr": "*fp32", "eps": "fp32"}
        for name, kernel, width, extra, changed in (
            ("adaln", adaln_kernel, DIM, {}, modulation),
            ("rows", rows_kernel, DIM, {"GELU": False}, {}),
            ("gelu", rows_kernel, FFN, {"GELU": True}, {}),
        ):
            groups = groups_of(width)
            constants = {"GROUPS": groups, "ROTATED": rotated, "E4M3": e4m3} | extra
            options = {"num_warps": tuning.row_warps(groups * 256), "enable_fp_fusion": False}
            yield Variant(f"{name} {label}", kernel, types | changed, constants, options)


def attention_variants(arch: str) -> Iterator[Variant]:
    padded = int(triton.next_power_of_2(HEADS))
    types = dict.fromkeys(("weight_ptr", "cos_ptr", "sin_ptr", "smoothing_ptr", "out_scale_ptr"), "*fp32")
    types |= {"x_ptr": "*bf16", "out_ptr": "*i8", "H": "i32", "eps": "fp32"} | strides(rms_rope_kernel)
    for name, rope, smoothing in (("q", True, False), ("k", True, True), ("text k", False, True), ("text q", False, False)):
        constants = {"HAS_ROPE": rope, "HAS_SMOOTHING": smoothing, "HEADS": padded, "HEAD_DIM": HEAD_DIM}
        options = {"num_warps": tuning.row_warps(padded * HEAD_DIM), "enable_fp_fusion": False}
        yield Variant(f"rms_rope {name}", rms_rope_kernel, types, constants, options)
    for pv in tuning.pv_choices(arch):
        dtype = tuning.PV_DTYPES[pv]
        types = {"v_ptr": "*bf16", "out_ptr": VALUE_TYPES[pv], "out_scale_ptr": "*fp32", "M": "i32"} | strides(values_kernel)
        constants = {"HEAD_DIM": HEAD_DIM, "VALUE_MAX": VALUE_MAX[dtype]}
        yield Variant(f"values {pv}", values_kernel, types, constants, {"num_warps": 4, "enable_fp_fusion": False})
        for width, label in ((HEAD_DIM, ""), (64, ", heads of 64")):
            yield attention_variant(arch, pv, width, f"attention {pv}{label}")


def attention_variant(arch: str, pv: str, head_dim: int, name: str) -> Variant:
    tile, dtype = tuning.attention_tile(arch, pv, head_dim), tuning.PV_DTYPES[pv]
    types = dict.fromkeys(("q_ptr", "k_ptr"), "*i8") | {f"{letter}_scale_ptr": "*fp32" for letter in "qkv"}
    types |= {"v_ptr": CODE_TYPES.get(pv, "*fp16"), "out_ptr": "*bf16", "M": "i32", "N": "i32", "softmax_scale": "fp32"}
    constants = {"HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "HALF_SUM": tile.half_sum}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kinds = ("int8",) if pv == "int8" else ("int8", pv)
    operands = 64 * head_dim * (1 + dtype.itemsize)
    return Variant(name, attention_kernel, types | strides(attention_kernel), constants, options, kinds, operands, scale_loads=1)


def strides(kernel: Any) -> dict[str, str]:
    return {name: "i32" for name in kernel.arg_names if name.startswith("stride")}


def compiled(variant: Variant, arch: str, alignment: int = 16) -> Compiled:
    """One variant for one architecture, measured and judged; `alignment`: what pointers, strides and K are known to be divisible by."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", alignment]]
        for index, name in enumerate(names)
        if name not in variant.constants and name not in NOT_ALIGNED and not (name == "N" and variant.kernel is attention_kernel)
    }
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 32)
    start = time.perf_counter()
    result = triton.compile(ASTSource(variant.kernel, signature, variant.constants, aligned), target=target, options=variant.options)
    seconds = time.perf_counter() - start
    nvidia = arch.startswith("sm_")
    assembly = result.asm["ptx" if nvidia else "amdgcn"]
    registers, spilled, fused = nvidia_resources(result.asm["cubin"], assembly) if nvidia else amd_resources(assembly)
    matrix = " + ".join(filter(None, (matrix_instruction(assembly, kind) for kind in variant.matrix)))
    narrowest = narrowest_load(assembly, variant) if nvidia else narrowest_amd_load(assembly, variant)
    shared = int(result.metadata.shared)
    return Compiled(
        arch, variant.name, registers, spilled, shared, matrix, narrowest, seconds,
        faults(variant, arch, spilled, shared, matrix, narrowest, fused),
    )  # fmt: skip


def faults(variant: Variant, arch: str, spilled: int, shared: int, matrix: str, narrowest: int, fused: int) -> list[str]:
    found = []
    if shared > SHARED_LIMIT[arch] * 1024:
        found.append(f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]} KB")
    if variant.matrix and spilled:
        found.append(f"{spilled} bytes spilled")
    found += [f"no {kind} matrix instruction" for kind in variant.matrix if not re.search(MATRIX[kind], matrix)]
    if variant.matrix and narrowest < 16:
        found.append(f"operands are loaded {narrowest} bytes at a time")
    if variant.unfused and fused:
        found.append(f"{fused} fused multiply-adds")
    return found


def nvidia_resources(cubin: bytes, ptx: str) -> tuple[int, int, int]:
    """(registers, bytes of stack, where spilled registers lie, fused multiply-adds) of the one kernel of a cubin.

    A division is made of fused multiply-adds and rounds once all the same. Beside divisions the PTX is counted instead of the machine
    code: its multiplications and additions must name their rounding, which forbids the assembler to fuse them.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([str(tools / "cuobjdump"), "--dump-resource-usage"], [str(tools / "nvdisasm"), "-c"])
        usage, code = (subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout for command in commands)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    fused = re.findall(r"\bfma\.|\b(?:mul|add|sub)(?:\.ftz)?\.f32", ptx) if "div.rn.f32" in ptx else re.findall(r"\bFFMA", code)
    return registers, stack + local, len(fused)


def amd_resources(assembly: str) -> tuple[int, int, int]:
    count = {key: int(value) for key, value in re.findall(r"\.([vs]gpr_(?:spill_)?count):\s*(\d+)", assembly)}
    spilled = 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
    fused = len(re.findall(r"\bv_(?:dual_|pk_)?fma", assembly)) - 5 * assembly.count("v_div_fixup_f32")  # a division has five
    return count["vgpr_count"], spilled, fused


MATRIX = {
    "int8": r"(?:wg)?mma\.m\d+n\d+k\d+\.s32\.s8\.s8\S*|v_wmma_i32_16x16x16_iu8",
    "fp8": r"(?:wg)?mma\.m\d+n\d+k\d+\.f(?:16|32)\.e4m3\.e4m3\S*",
    "fp16": r"(?:wg)?mma\.m\d+n\d+k\d+\.f(?:16|32)\.f16\.f16\S*|v_wmma_f32_16x16x16_f16",
    "decode": r"(?:wg)?mma\.m\d+n\d+k\d+\.f32\.f16\.f16\S*|v_wmma_f32_16x16x16_f16",
}
SHORTER = re.compile(r"\.(sync|aligned|row|col|satfinite|mma_async)\b")


def matrix_instruction(assembly: str, kind: str) -> str:
    """The matrix instruction of the expected type, its modifiers left out; empty where there is none."""
    found = re.search(MATRIX[kind], SHORTER.sub("", assembly))
    return found[0] if found else ""


def narrowest_load(assembly: str, variant: Variant) -> int:
    """Bytes of the narrowest load per thread: of asynchronous copies where the kernel has any, else of all global loads."""
    copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+)", assembly)]
    if copies:
        allowed = variant.scale_loads * variant.options["num_stages"]
        return min(sorted(copies)[allowed:])
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", assembly)
    return min((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0)


def narrowest_amd_load(assembly: str, variant: Variant) -> int:
    """As above: 16 where enough loads of 16 bytes are there for one step's operands, because scales use the same instruction."""
    sizes = {"b128": 16, "b96": 12, "b64": 8, "b32": 4, "u16": 2, "d16": 2, "u8": 1, "i8": 1}
    loads = [sizes[kind] for kind in re.findall(r"(?:global|buffer)_load_(b\d+|u\d+|i\d+|d16)", assembly)]
    if not variant.operand_bytes:
        return min(loads, default=0)
    per_thread = variant.operand_bytes / (32 * variant.options["num_warps"])
    return 16 if loads.count(16) * 16 >= per_thread and min(loads) >= 4 else min(loads, default=0)


def table(rows: list[Compiled]) -> str:
    heads = "| kernel | architecture | registers | spilled | shared KB | narrowest load | matrix instruction |"
    lines = [heads, "|---|---|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = (row.kernel, row.arch, row.registers, row.spilled_bytes, f"{row.shared_bytes / 1024:.1f}", row.narrowest_load_bytes)
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row.matrix or '-'} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=tuning.ARCHITECTURES, default=list(tuning.ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", default=[""], help="only kernels whose name contains one of these")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    wanted = [(variant, arch) for arch in options.arch for variant in variants(arch)]
    chosen = [(variant, arch) for variant, arch in wanted if any(part in variant.name for part in options.kernel)]
    rows = sorted((compiled(*pair) for pair in chosen), key=lambda row: row.kernel)
    print(table(rows))
    if options.csv:
        names = [item.name for item in fields(Compiled) if item.name not in ("faults", "seconds")]
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([names, *([getattr(row, name) for name in names] for row in rows)])
    failed = [f"{row.arch} {row.kernel}: {fault}" for row in rows for fault in row.faults]
    for line in failed:
        print(f"compile_kernels: {line}", file=sys.stderr)
    print(f"\n{len(rows)} compiled in {sum(row.seconds for row in rows):.0f} s with Triton {triton.__version__}, {len(failed)} faults")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
