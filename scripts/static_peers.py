"""What our kernels' bounds are set beside: two plain bf16 kernels written here, and peers' Triton
kernels where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from scripts.compile_kernels import Variant

SAGE, COMFY = "sageattention", "comfy_kitchen"
# (block_m, block_n, block_k, stages, warps) of comfy-kitchen's autotuner that are not slow on
# sight.
COMFY_TILES = ((128, 256, 64, 3, 8), (64, 256, 32, 4, 4), (128, 128, 32, 4, 4))


@triton.jit
def flash_kernel(q_ptr, k_ptr, v_ptr, out_ptr, scale, stride_h, stride_m, M, N, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip  # noqa: E501
    """Flash attention in bf16 as the Triton tutorial's loop has it, no mask. q, k, v, out: [head,
    token, D].
    """
    base = tl.program_id(1).to(tl.int64) * stride_h
    rows, keys, channel = (
        tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M),
        tl.arange(0, BLOCK_N),
        tl.arange(0, D),
    )
    q = tl.load(q_ptr + base + rows[:, None] * stride_m + channel[None, :])
    k_ptrs = k_ptr + base + keys[None, :] * stride_m + channel[:, None]
    v_ptrs = v_ptr + base + keys[:, None] * stride_m + channel[None, :]
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, D), tl.float32)
    for _ in range(0, N, BLOCK_N):
        logits = tl.dot(q, tl.load(k_ptrs))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(p, 1)
        result = tl.dot(p.to(tl.bfloat16), tl.load(v_ptrs), result * decay[:, None])
        maximum = new_maximum
        k_ptrs += BLOCK_N * stride_m
        v_ptrs += BLOCK_N * stride_m
    tl.store(
        out_ptr + base + rows[:, None] * stride_m + channel[None, :],
        (result / total[:, None]).to(tl.bfloat16),
    )


@triton.jit
def product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    M,
    N,
    K,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a b^T in bf16; K is the last dimension of both."""
    rows, columns = (
        tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M),
        tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N),
    )
    k = tl.arange(0, BLOCK_K)
    a_ptrs, b_ptrs = (
        a_ptr + rows[:, None] * stride + k[None, :],
        b_ptr + columns[None, :] * stride + k[:, None],
    )
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        accumulator = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), accumulator)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], accumulator.to(tl.bfloat16))


Peer = tuple[Variant, tuple[str, ...]]  # and the arguments that are not divisible by 16


def yardsticks(arch: str) -> Iterator[Peer]:
    large = arch in ("sm_80", "sm_90")
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16") | {"scale": "fp32"}
    types |= dict.fromkeys(("stride_h", "stride_m", "M", "N"), "i32")
    constants = {"D": 128, "BLOCK_M": 128, "BLOCK_N": 128 if arch == "sm_90" else 64}
    options = {"num_warps": 8, "num_stages": 3 if arch == "sm_80" else 2}
    yield Variant("yardstick bf16 flash", flash_kernel, types, constants, options), ()
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*bf16") | dict.fromkeys(
        ("M", "N", "K", "stride"), "i32"
    )
    tile = (
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
        if large
        else {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
    )
    yield (
        Variant(
            "yardstick bf16 product", product_kernel, types, tile, {"num_warps": 8, "num_stages": 3}
        ),
        (),
    )


def peers(folder: Path | None) -> Iterator[Peer]:
    """Of installed packages, or of wheels unpacked in `folder`. Says in one line which are not
    there.
    """
    for package, found in ((SAGE, sage), (COMFY, comfy)):
        place = place_of(package, folder)
        if place is None:
            print(
                f"static_bound: {package} is not installed: its rows stay as they are",
                file=sys.stderr,
            )
            continue
        yield from found(place)


def place_of(package: str, folder: Path | None) -> Path | None:
    """The folder of a package's files."""
    if folder is not None and (folder / package).is_dir():
        return folder / package
    spec = importlib.util.find_spec(package)
    return (
        Path(spec.submodule_search_locations[0])
        if spec and spec.submodule_search_locations
        else None
    )


def sage(place: Path) -> Iterator[Peer]:
    """SageAttention 1: blocks of 128 queries and 64 keys, as its `sageattn` launches heads of
    128.
    """
    kernel = kernel_of(
        module_at(place / "attn_qk_int8_per_block.py", "static_peer_sage"), "_attn_fwd"
    )
    types = {
        "Q": "*i8",
        "K": "*i8",
        "V": "*fp16",
        "Q_scale": "*fp32",
        "K_scale": "*fp32",
        "Out": "*bf16",
    }
    types |= {
        name: "i32"
        for name in kernel.arg_names
        if name.startswith("stride") or name in ("qo_len", "kv_len")
    }
    constants = {
        "H": 40,
        "num_kv_groups": 1,
        "HEAD_DIM": 128,
        "BLOCK_M": 128,
        "BLOCK_N": 64,
        "STAGE": 1,
    }
    yield (
        Variant("sageattention 1.0.6", kernel, types, constants, {"num_warps": 8, "num_stages": 4}),
        ("qo_len", "kv_len"),
    )


def comfy(place: Path) -> Iterator[Peer]:
    """comfy-kitchen's int8 product with a scale per row."""
    sys.path.insert(0, str(place.parent))
    try:
        module = importlib.import_module("comfy_kitchen.backends.triton.quantization")
    finally:
        sys.path.remove(str(place.parent))
    kernel = kernel_of(module, "_int8_matmul_dequant_per_row_kernel")
    pointers = {
        "a_ptr": "*i8",
        "b_ptr": "*i8",
        "c_ptr": "*bf16",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
    }
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    ones = {name: 1 for name in ("stride_ak", "stride_bk", "stride_cn") if name in kernel.arg_names}
    for m, n, k, stages, warps in COMFY_TILES:
        chosen = {"block_m": m, "block_n": n, "block_k": k, "group_size_m": 8, "has_bias": True}
        constants = ones | {
            name: chosen[name.lower()] for name in kernel.arg_names if name.lower() in chosen
        }
        name = f"comfy-kitchen {m}x{n}x{k}, {warps} warps"
        yield (
            Variant(name, kernel, types, constants, {"num_warps": warps, "num_stages": stages}),
            ("M",),
        )


def module_at(path: Path, name: str) -> Any:
    """A module by its file: the package around it may need what is not installed."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kernel_of(module: Any, name: str) -> Any:
    """The JIT function within autotuners and heuristics."""
    kernel = getattr(module, name)
    while (
        hasattr(kernel, "configs") or hasattr(kernel, "values") or not hasattr(kernel, "arg_names")
    ):
        kernel = kernel.fn
    return kernel
