"""Compiles every Triton kernel and variant for six architectures on a machine that has none of
them, and gates what comes out.

    python -m scripts.compile_kernels [--arch sm_89 ...] [--kernel attention ...] [--jobs 4] [--csv FILE]

Prints a table of registers, spilled bytes, shared memory, matrix instructions and the narrowest
load of the main operands. Exits 1 where a kernel spills, where a GEMM or attention has not enough
matrix instructions of the expected type for each of its products, or loads its operands in less
than 16 bytes, where the machine code of an int8 linear holds a fused multiply-add (its bits would not be
the reference's), and where any kernel needs more shared memory than the architecture gives. Of
every argument the compiler knows what it knows at run time (`known`): pointers and most sizes and
strides are divisible by 16; those that the resolution or the length of a clip decides are not.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None):
    print("compile_kernels: TRITON_INTERPRET is ignored, kernels are compiled", file=sys.stderr)

import triton
from lowvram_kernels import tuning
from lowvram_kernels.adaln_quantize_triton import adaln_kernel
from lowvram_kernels.attention_int8_triton import (
    attention_kernel,
    one_loop,
    permuted,
    scale_copies,
)
from lowvram_kernels.attention_int8_triton import (
    tile_of as attention_tile_of,
)
from lowvram_kernels.common_triton import scalar_products
from lowvram_kernels.quantize_rows_triton import groups_of, rows_kernel
from lowvram_kernels.quantize_values import VALUE_MAX
from lowvram_kernels.quantize_values_triton import values_kernel
from lowvram_kernels.quantized_linear_triton import linear_kernel, tile_of
from lowvram_kernels.rms_rope_quantize_triton import rms_rope_kernel
from lowvram_kernels.sizes import STORED_VALUES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# KB that one program may use
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99, "gfx1100": 64}
# Numbers of tokens or heads, and strides that number tokens or tiles of keys: 32,760 and 512 at
# 480p, 75,600 and 1,182 at 720p. Each is not divisible by 16 at some shape of A14B; every other
# integer is at all of them.
NOT_ALIGNED = {
    "attention_kernel": {"stride_qs"},
    "values_kernel": {"M"},
    "rms_rope_kernel": {"H", "stride_scale_h"},
}
ONE = {"stride_scale_m"}  # is 1, which Triton makes a constant of
# where variants of the GEMM and of attention that A14B does not need are compiled: mma and wgmma
MORE = ("sm_86", "sm_90")
CODE_TYPES = {"int8": "*i8", "fp8": "*fp8e4nv", "decode": "*u8"}
VALUE_TYPES = {"int8": "*i8", "fp16": "*fp16", "fp8": "*u8"}  # as the values are stored
DIM, HEADS, HEAD_DIM, FFN = 5120, 40, 128, 13824
DEMO_DIM, DEMO_HEADS, DEMO_HEAD_DIM, DEMO_FFN = 256, 4, 64, 512


@dataclass(frozen=True)
class Variant:
    """One specialization: the types of its arguments, its constants and launch options, and what is
    expected of it.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    matrix: dict[str, int] = field(
        default_factory=dict
    )  # key of MATRIX -> multiplications of its products in one program, loop bodies once
    # tile products in its code: loop bodies once, the keys that are left once more
    products: int = 0
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
    yield from head_variants()
    yield from attention_variants(arch)


def linear_variants(arch: str) -> Iterator[Variant]:
    floats = dict.fromkeys(("a_scale_ptr", "w_scale_ptr", "bias_ptr", "gate_ptr"), "*fp32")
    sizes = dict.fromkeys(("M", "N", "K", "stride_a", "stride_w", "stride_out"), "i32")
    for int8 in (True, False):
        kind = tuning.linear_kind(arch, int8)
        tile = tile_of(arch, kind)
        main = [
            ("store", {}),
            ("store, ragged K", {"EVEN_K": False}),
            ("gelu", {"GELU": True}),
            ("+= y", {"ACCUMULATE": True}),
        ]
        main += [("+= gate * y", {"ACCUMULATE": True, "HAS_GATE": True})]
        if int8:  # the second code of an activation
            main += [("fp16 += y, no bias", {"ACCUMULATE": True, "HAS_BIAS": False})]
            main += [
                (
                    "+= gate * y, no bias",
                    {"ACCUMULATE": True, "HAS_GATE": True, "HAS_BIAS": False},
                )
            ]
        more = [(f"{label}, ragged K", changed | {"EVEN_K": False}) for label, changed in main[2:]]
        more += [
            ("store, no bias", {"HAS_BIAS": False}),
            ("store, fp32", {}),
            ("gelu, fp32", {"GELU": True}),
        ]
        for label, changed in main + (more if arch in MORE else []):
            accumulate = "ACCUMULATE" in changed
            codes = CODE_TYPES[kind]
            fp32 = (accumulate and "fp16" not in label) or "fp32" in label
            out = "*fp32" if fp32 else "*fp16"
            types = floats | sizes | {"a_ptr": codes, "w_ptr": codes, "out_ptr": out}
            constants = {
                "HAS_BIAS": True,
                "GELU": False,
                "HAS_GATE": False,
                "ACCUMULATE": False,
                "INT8": int8,
                "DECODE": kind == "decode",
                "EVEN_K": True,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": 8,
                "PARTS": tile.parts,
                "SCALAR": scalar_products(arch),
            } | changed
            options = {
                "num_warps": tile.warps,
                "num_stages": tile.stages,
                "enable_fp_fusion": False,
            }
            operands = (tile.block_m + tile.block_n) * tile.block_k
            matrix = {kind: tile.block_m * tile.block_n * tile.block_k}
            yield Variant(
                f"linear {kind} {label}",
                linear_kernel,
                types,
                constants,
                options,
                matrix,
                1,
                operands,
                unfused=int8,
            )


def row_variants() -> Iterator[Variant]:
    for rotated, e4m3 in ((True, False), (False, False), (False, True)):
        label = ("int8" if not e4m3 else "fp8") + (" rotated" if rotated else "")
        out = "*i32" if rotated else "*u8" if e4m3 else "*i8"
        types = {
            "x_ptr": "*fp16",
            "out_ptr": out,
            "out_scale_ptr": "*fp32",
            "low_ptr": out,
            "low_scale_ptr": "*fp32",
            "K": "i32",
            "stride_x": "i32",
            "stride_out": "i32",
        }
        modulation = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "shift_ptr": "*fp32", "eps": "fp32"}
        for name, kernel, width, extra, changed in (
            ("adaln", adaln_kernel, DIM, {}, modulation),
            ("rows", rows_kernel, DIM, {"GELU": False}, {}),
            ("gelu", rows_kernel, FFN, {"GELU": True}, {}),
            ("demo's adaln", adaln_kernel, DEMO_DIM, {}, modulation),
            ("demo's rows", rows_kernel, DEMO_DIM, {"GELU": False}, {}),
            ("demo's gelu", rows_kernel, DEMO_FFN, {"GELU": True}, {}),
        ):
            groups = groups_of(width)
            options = {"num_warps": tuning.row_warps(groups * 256), "enable_fp_fusion": False}
            for low in (False,) if e4m3 else (False, True):
                constants = {"GROUPS": groups, "ROTATED": rotated, "E4M3": e4m3, "LOW": low}
                yield Variant(
                    f"{name} {label}" + (", two codes" if low else ""),
                    kernel,
                    types | changed,
                    constants | extra,
                    options,
                )


def head_variants() -> Iterator[Variant]:
    types = dict.fromkeys(
        ("weight_ptr", "cos_ptr", "sin_ptr", "smoothing_ptr", "out_scale_ptr"), "*fp32"
    )
    types |= {"x_ptr": "*fp16", "out_ptr": "*i8", "H": "i32", "eps": "fp32"} | strides(
        rms_rope_kernel
    )
    for owner, heads, width in (("", HEADS, HEAD_DIM), ("demo's ", DEMO_HEADS, DEMO_HEAD_DIM)):
        padded = int(triton.next_power_of_2(heads))
        for name, rope, smoothing in (
            ("q", True, False),
            ("k", True, True),
            ("text k", False, True),
            ("text q", False, False),
        ):
            constants = {
                "HAS_ROPE": rope,
                "HAS_SMOOTHING": smoothing,
                "HEADS": padded,
                "HEAD_DIM": width,
            }
            options = {"num_warps": tuning.row_warps(padded * width), "enable_fp_fusion": False}
            yield Variant(f"{owner}rms_rope {name}", rms_rope_kernel, types, constants, options)


def attention_variants(arch: str) -> Iterator[Variant]:
    for pv in tuning.pv_choices(arch):
        for width, label in ((HEAD_DIM, ""), (DEMO_HEAD_DIM, f", heads of {DEMO_HEAD_DIM}")):
            types = {
                "v_ptr": "*fp16",
                "out_scale_ptr": "*fp32",
                "M": "i32",
            } | strides(values_kernel)
            if pv in VALUE_TYPES:
                yield Variant(
                    f"values {pv}{label}",
                    values_kernel,
                    types | {"out_ptr": VALUE_TYPES[pv]},
                    {"HEAD_DIM": width, "VALUE_MAX": VALUE_MAX[tuning.PV_DTYPES[pv]]},
                    {"num_warps": 8, "enable_fp_fusion": False},
                )
            one = attention_variant(arch, pv, width, f"attention {pv}{label}")
            yield one
            if arch in MORE and width == HEAD_DIM:
                yield replace(one, name=f"{one.name}, fp32", types=one.types | {"out_ptr": "*fp32"})


def attention_variant(arch: str, pv: str, head_dim: int, name: str) -> Variant:
    tile, dtype = attention_tile_of(arch, pv, head_dim), tuning.PV_DTYPES[pv]
    scaled = STORED_VALUES[pv].scaled
    loops = 1 if one_loop(arch, pv) else 2  # the second takes the keys that are left
    types = dict.fromkeys(("q_ptr", "k_ptr"), "*i8") | {
        f"{letter}_scale_ptr": "*fp32" for letter in "qkv"
    }
    types |= {
        "v_ptr": CODE_TYPES.get(pv, f"*{pv}"),
        "out_ptr": "*fp16",
        "M": "i32",
        "N": "i32",
        "softmax_scale": "fp32",
    }
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "SCALED": scaled,
        "HALF_SUM": tile.half_sum,
        "PERMUTED": permuted(arch, pv),
        "SCALE_COPIES": scale_copies(arch, pv),
        "WIDE": False,
        "ONE_LOOP": one_loop(arch, pv),
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    one = loops * tile.block_m * tile.keys * head_dim
    matrix = {"int8": 2 * one} if pv == "int8" else {"int8": one, pv: one}
    operands = tile.keys * head_dim * (1 + dtype.itemsize)
    return Variant(
        name,
        attention_kernel,
        types | strides(attention_kernel),
        constants,
        options,
        matrix,
        loops * (3 if scaled else 2),
        operands,
        scale_loads=2 if scaled else 1,
    )


def strides(kernel: Any) -> dict[str, str]:
    return {name: "i32" for name in kernel.arg_names if name.startswith("stride")}


def known(kernel: Any, name: str) -> int:
    """What the compiler knows an integer or a pointer to be divisible by at run time: 16 or, where
    shapes decide it, 1; 0: it is 1.
    """
    parameter = kernel.params[kernel.arg_names.index(name)]
    if name in ONE:
        return 0
    return 1 if name in NOT_ALIGNED.get(kernel.__name__, ()) or parameter.do_not_specialize else 16


def compiled(variant: Variant, arch: str, unaligned: tuple[str, ...] = ()) -> Compiled:
    """One variant for one architecture, measured and judged; `unaligned`: arguments that shall not
    be divisible by 16 either.
    """
    start = time.perf_counter()
    result = built(variant, arch, unaligned)
    seconds = time.perf_counter() - start
    nvidia = arch.startswith("sm_")
    assembly = result.asm["ptx" if nvidia else "amdgcn"]
    registers, spilled, fused = (
        nvidia_resources(result.asm["cubin"], assembly, variant.unfused)
        if nvidia
        else amd_resources(assembly)
    )
    matrix = {
        kind: matrix_instructions(assembly, kind, variant.options["num_warps"])
        for kind in variant.matrix
    }
    multiplications = {kind: count for kind, (_, count) in matrix.items()}
    products = len(re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot)\b.*#mma", result.asm["ttgir"]))
    narrowest = (
        narrowest_load(assembly, variant) if nvidia else narrowest_amd_load(assembly, variant)
    )
    shared = int(result.metadata.shared)
    shown = " + ".join(dict.fromkeys(text for names, _ in matrix.values() for text in names))
    return Compiled(
        arch, variant.name, registers, spilled, shared, shown, narrowest, seconds,
        faults(variant, arch, spilled, shared, multiplications, products, narrowest, fused),
    )  # fmt: skip


def all_compiled(names: Sequence[tuple[str, str]], jobs: int) -> list[Compiled]:
    """Variants by (name, architecture), in as many processes: Triton's kernels do not travel
    between them.
    """
    if jobs <= 1:
        return [_compiled_by_name(pair) for pair in names]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compiled_by_name, names))


def _compiled_by_name(pair: tuple[str, str]) -> Compiled:
    name, arch = pair
    return compiled(next(variant for variant in variants(arch) if variant.name == name), arch)


def built(variant: Variant, arch: str, unaligned: tuple[str, ...] = ()) -> Any:
    """What Triton makes of a variant for an architecture: metadata, and the code of every stage."""
    names = variant.kernel.arg_names
    constants = variant.constants | {name: 1 for name in names if name in ONE}
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in unaligned
        and signature[name] not in ("constexpr", "fp32")
        and known(variant.kernel, name) == 16
    }
    target = (
        GPUTarget("cuda", int(arch[3:]), 32)
        if arch.startswith("sm_")
        else GPUTarget("hip", arch, 32)
    )
    return triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned),
        target=target,
        options=variant.options,
    )


def faults(
    variant: Variant,
    arch: str,
    spilled: int,
    shared: int,
    multiplications: dict[str, int],
    products: int,
    narrowest: int,
    fused: int,
) -> list[str]:
    """What is wrong with a variant; multiplications: how many each kind of matrix instruction does
    in one program; products: `tl.dot`s that became matrix instructions. The former does not tell on
    gfx1100, where warps repeat each other's instructions, the latter everywhere.
    """
    found = []
    if shared > SHARED_LIMIT[arch] * 1024:
        found.append(f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]} KB")
    if spilled:
        found.append(f"{spilled} bytes spilled")
    for kind, needed in variant.matrix.items():
        if not multiplications.get(kind):
            found.append(f"no {kind} matrix instruction")
        elif multiplications[kind] < needed:
            found.append(
                f"{kind} matrix instructions for {multiplications[kind]} of {needed} "
                f"multiplications"
            )
    if products < variant.products:
        found.append(f"{products} of {variant.products} products in matrix instructions")
    if variant.matrix and narrowest < 16:
        found.append(f"operands are loaded {narrowest} bytes at a time")
    if variant.unfused and fused:
        found.append(f"{fused} fused multiply-adds")
    return found


def nvidia_resources(cubin: bytes, ptx: str, unfused: bool) -> tuple[int, int, int]:
    """(registers, bytes of stack, where spilled registers lie, fused multiply-adds) of the one
    kernel of a cubin; 0 but where `unfused`.

    A division is made of fused multiply-adds and rounds once all the same. Beside divisions the PTX
    is counted instead of the machine
    code: its multiplications and additions must name their rounding, which forbids the assembler to
    fuse them.
    """
    registers, spilled, code = disassembled(cubin, code=unfused and "div.rn.f32" not in ptx)
    fused = (
        re.findall(r"\bFFMA", code)
        if code
        else re.findall(r"\bfma\.|\b(?:mul|add|sub)(?:\.ftz)?\.f32", ptx)
    )
    return registers, spilled, len(fused) if unfused else 0


def disassembled(cubin: bytes, code: bool = True) -> tuple[int, int, str]:
    """(registers, bytes of stack, machine code where asked for) of the one kernel of a cubin, by
    the tools that come with Triton.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = output(str(tools / "cuobjdump"), "--dump-resource-usage", str(path))
        text = output(str(tools / "nvdisasm"), "-c", str(path)) if code else ""
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, text


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def amd_resources(assembly: str) -> tuple[int, int, int]:
    count = {
        key: int(value)
        for key, value in re.findall(r"\.([vs]gpr_(?:spill_)?count):\s*(\d+)", assembly)
    }
    spilled = 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
    fused = len(re.findall(r"\bv_(?:dual_|pk_)?fma", assembly))
    fused -= 5 * assembly.count("v_div_fixup_f32")  # a division has five
    # a sum with an fp16 operand: times 1.0, so that it rounds once
    fused -= len(re.findall(r"\bv_fma_mix_f32 \w+, \w+, 1\.0, ", assembly))
    return count["vgpr_count"], spilled, fused


MATRIX = {
    "int8": r"(?:wg)?mma\.m\d+n\d+k\d+\.s32\.s8\.s8\S*|v_wmma_i32_16x16x16_iu8",
    "fp8": r"(?:wg)?mma\.m\d+n\d+k\d+\.f(?:16|32)\.e4m3\.e4m3\S*",
    "fp16": r"(?:wg)?mma\.m\d+n\d+k\d+\.f(?:16|32)\.f16\.f16\S*|v_wmma_f32_16x16x16_f16",
    "bf16": r"(?:wg)?mma\.m\d+n\d+k\d+\.f32\.bf16\.bf16\S*|v_wmma_f32_16x16x16_bf16",
    "decode": r"(?:wg)?mma\.m\d+n\d+k\d+\.f32\.f16\.f16\S*|v_wmma_f32_16x16x16_f16",
}
SHORTER = re.compile(r"\.(sync|aligned|row|col|satfinite|mma_async)\b")
AMD_TILE = 16 * 16 * 16


def matrix_instructions(assembly: str, kind: str, warps: int) -> tuple[list[str], int]:
    """(the matrix instructions of the expected type, their modifiers left out; how many
    multiplications all of them are in one program).

    Four warps share a wgmma; a warp has every other instruction for itself.
    """
    found = re.findall(MATRIX[kind], SHORTER.sub("", assembly))
    count = 0
    for text in found:
        tile = re.search(r"m(\d+)n(\d+)k(\d+)", text)
        count += (
            math.prod(map(int, tile.groups())) * warps // (4 if text.startswith("wgmma") else 1)
            if tile
            else AMD_TILE * warps
        )
    return list(dict.fromkeys(found)), count


def narrowest_load(assembly: str, variant: Variant) -> int:
    """Bytes of the narrowest load per thread.

    With main operands: 16 where asynchronous copies of 16 bytes bring all of them in every stage,
    no other asynchronous copy is there than the scales', and no load is narrower than a scale; else
    the narrowest of all loads.
    """
    copies = [
        int(size, 16)
        for size in re.findall(
            r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+)", assembly
        )
    ]
    found = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)", assembly)
    loads = [int(count or 1) * int(bits) // 8 for count, bits in found]
    if not variant.operand_bytes:
        return min(copies + loads, default=0)
    stages, wide = variant.options["num_stages"], copies.count(16)
    covered = wide * 16 * 32 * variant.options["num_warps"] >= variant.operand_bytes * stages
    scales = (
        len(copies) - wide <= variant.scale_loads * stages and min(copies + loads, default=0) >= 4
    )
    return 16 if covered and scales else min(copies + loads, default=0)


def narrowest_amd_load(assembly: str, variant: Variant) -> int:
    """As above: 16 where enough loads of 16 bytes are there for one step's operands, because scales
    use the same instruction.
    """
    sizes = {"b128": 16, "b96": 12, "b64": 8, "b32": 4, "u16": 2, "d16": 2, "u8": 1, "i8": 1}
    loads = [
        sizes[kind] for kind in re.findall(r"(?:global|buffer)_load_(b\d+|u\d+|i\d+|d16)", assembly)
    ]
    if not variant.operand_bytes:
        return min(loads, default=0)
    per_thread = variant.operand_bytes / (32 * variant.options["num_warps"])
    return 16 if loads.count(16) * 16 >= per_thread and min(loads) >= 4 else min(loads, default=0)


def table(rows: list[Compiled]) -> str:
    heads = (
        "| kernel | architecture | registers | spilled | shared KB | narrowest load | "
        "matrix instruction |"
    )
    lines = [heads, "|---|---|--:|--:|--:|--:|---|"]
    for row in rows:
        cells = (
            row.kernel,
            row.arch,
            row.registers,
            row.spilled_bytes,
            f"{row.shared_bytes / 1024:.1f}",
            row.narrowest_load_bytes,
        )
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row.matrix or '-'} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", choices=tuning.ARCHITECTURES, default=list(tuning.ARCHITECTURES)
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[""], help="only kernels whose name contains one of these"
    )
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at once")
    options = parser.parse_args(arguments)
    wanted = [(variant.name, arch) for arch in options.arch for variant in variants(arch)]
    chosen = [(name, arch) for name, arch in wanted if any(part in name for part in options.kernel)]
    rows = sorted(all_compiled(chosen, options.jobs), key=lambda row: row.kernel)
    print(table(rows))
    if options.csv:
        names = [item.name for item in fields(Compiled) if item.name not in ("faults", "seconds")]
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([names, *([getattr(row, name) for name in names] for row in rows)])
    failed = [f"{row.arch} {row.kernel}: {fault}" for row in rows for fault in row.faults]
    for line in failed:
        print(f"compile_kernels: {line}", file=sys.stderr)
    print(
        f"\n{len(rows)} compiled in {sum(row.seconds for row in rows):.0f} s with Triton "
        f"{triton.__version__}, {len(failed)} faults"
    )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
