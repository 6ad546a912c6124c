"""lowvram's kernels beside what people use today, at the shapes of an A14B block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import lowvram_kernels.ops as ops
import torch
import torch.nn.functional as F
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import (
    INTERPRETER,
    PV_DTYPES,
    architecture,
    pv_choices,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.bench.timing import Row, machine, measure, reason

TOKENS = (8192, 32760, 75600)
# (N, K) of a block's linears; k and v are one product, and o and ffn.2 are added to the residual
# stream.
LINEARS = {
    "q": (5120, 5120),
    "k, v": (10240, 5120),
    "o +=": (5120, 5120),
    "ffn.0": (13824, 5120),
    "ffn.2 +=": (5120, 13824),
}
HEADS, HEAD_DIM = 40, 128
TEXT_TOKENS = 512
SETS = 3  # of inputs in rotation
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
Run = Callable[[int], object]


@dataclass(frozen=True)
class Bench:
    """One row of work: an op at a shape, what it costs and who offers it."""

    op: str
    shape: str
    amount: float  # operations, or bytes
    unit: str  # TOPS or GB/s
    peak: str  # key of `bench_timing.peaks`
    providers: dict[str, Callable[[], Run]]


def rows_of(bench: Bench, peaks: dict[str, float], device: str = "cuda") -> Iterator[Row]:
    """Other providers that fail, however they do, are named with their reason and left out; a
    failure of lowvram's own is raised.
    """
    for name in bench.providers:
        try:
            yield row_of(bench, name, peaks, device)
        except Exception as error:
            if name.startswith("lowvram"):
                raise
            print(f"{bench.op} {bench.shape} {name}: not measured: {reason(error)}", flush=True)


def row_of(
    bench: Bench, name: str, peaks: dict[str, float], device: str = "cuda", repeats: int = 20
) -> Row:
    """One provider's row. Raises what it raises."""
    try:
        p20, median, p80 = measure(bench.providers[name](), repeats, device)
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    rate = bench.amount / median / (1e9 if bench.unit == "TOPS" else 1e6)
    peak = peaks.get(
        "int8" if name.startswith("lowvram") and bench.unit == "TOPS" else bench.peak, 0
    )
    return Row(
        bench.op,
        bench.shape,
        name,
        p20,
        median,
        p80,
        rate,
        bench.unit,
        rate / peak if peak else 0,
        *machine(),
    )


def linear_bench(name: str, m: int, n: int, k: int, device: str = "cuda") -> Bench:
    add = name.endswith("+=")

    def quantized(code: torch.dtype) -> Run:
        inputs = [(codes_of(m, k, device, code), scales_of(m, device)) for _ in range(SETS)]
        weight, scale, bias, gate = (
            codes_of(n, k, device, code),
            scales_of(n, device),
            *_vectors(n, device),
        )
        out = torch.zeros(m, n, device=device, dtype=torch.float32 if add else BF16)
        kwargs: dict[str, Any] = {"gate": gate, "accumulate": True} if add else {}
        return lambda i: ops.quantized_linear(*inputs[i % SETS], weight, scale, bias, out, **kwargs)

    def library(
        multiply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], code: torch.dtype
    ) -> Run:
        inputs = [(codes_of(m, k, device, code), scales_of(m, device)) for _ in range(SETS)]
        weight, scale, bias, gate = (
            codes_of(n, k, device, code),
            scales_of(n, device),
            *_vectors(n, device),
        )
        x = torch.zeros(m, n if add else 0, device=device)
        return lambda i: _add(multiply(*inputs[i % SETS], weight, scale, bias), x, gate, add)

    def bf16() -> Run:
        inputs = [torch.randn(m, k, device=device, dtype=BF16) for _ in range(SETS)]
        weight, bias, gate = torch.randn(n, k, device=device, dtype=BF16), *_vectors(n, device)
        x = torch.zeros(m, n if add else 0, device=device)
        narrow = bias.to(BF16)
        return lambda i: _add(F.linear(inputs[i % SETS], weight, narrow), x, gate, add)

    def comfy() -> Run:
        kitchen = import_module("comfy_kitchen")
        inputs = [torch.randn(m, k, device=device, dtype=BF16) for _ in range(SETS)]
        weight, scale, (bias, gate) = (
            codes_of(n, k, device),
            scales_of(n, device),
            _vectors(n, device),
        )
        x = torch.zeros(m, n if add else 0, device=device)
        narrow = bias.to(BF16)
        return lambda i: _add(
            kitchen.int8_linear(inputs[i % SETS], weight, scale, narrow, out_dtype=BF16),
            x,
            gate,
            add,
        )

    providers: dict[str, Callable[[], Run]] = {
        "lowvram int8": lambda: quantized(torch.int8),
        "lowvram fp8": lambda: quantized(E4M3),
        "torch bf16": bf16,
        "torch._int_mm + rescale": lambda: library(_int_mm, torch.int8),
        "torch._scaled_mm": lambda: library(_scaled_mm, E4M3),
        "torch._scaled_mm, fast accumulation": lambda: library(
            partial(_scaled_mm, fast=True), E4M3
        ),
    }
    if find_spec("comfy_kitchen"):
        providers[f"comfy-kitchen {version('comfy-kitchen')} int8 (quantizes x too)"] = comfy
    return Bench(f"linear {name}", f"M={m} N={n} K={k}", 2.0 * m * n * k, "TOPS", "bf16", providers)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def gelu_bench(m: int, n: int = 13824, k: int = 5120, device: str = "cuda") -> Bench:
    """From the rows of ffn.0 to the rows of ffn.2: GELU in the product and then `quantize_rows`, or
    after it in `gelu_quantize`.
    """

    def quantized(in_product: bool) -> Run:
        inputs = [(codes_of(m, k, device), scales_of(m, device)) for _ in range(SETS)]
        weight, scale, (bias, _) = codes_of(n, k, device), scales_of(n, device), _vectors(n, device)
        hidden, codes = (
            torch.empty(m, n, device=device, dtype=BF16),
            torch.empty(m, n, device=device, dtype=torch.int8),
        )
        code_scale = torch.empty(m, 1, device=device)
        quantize = ops.quantize_rows if in_product else ops.gelu_quantize

        def run(i: int) -> None:
            ops.quantized_linear(*inputs[i % SETS], weight, scale, bias, hidden, gelu=in_product)
            quantize(hidden, codes, code_scale, rotated=True)

        return run

    def bf16() -> Run:
        inputs = [torch.randn(m, k, device=device, dtype=BF16) for _ in range(SETS)]
        weight, bias = torch.randn(n, k, device=device, dtype=BF16), _vectors(n, device)[0].to(BF16)
        return lambda i: F.gelu(F.linear(inputs[i % SETS], weight, bias), approximate="tanh")

    providers: dict[str, Callable[[], Run]] = {
        "lowvram int8, GELU with the rows": lambda: quantized(False),
        "lowvram int8, GELU in the product": lambda: quantized(True),
        "torch bf16": bf16,
    }
    return Bench(
        "ffn.0, GELU, rows of ffn.2",
        f"M={m} N={n} K={k}",
        2.0 * m * n * k,
        "TOPS",
        "bf16",
        providers,
    )


def _int_mm(a: Tensor, a_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (torch._int_mm(a, weight.t()).float() * a_scale * scale.view(1, -1) + bias).to(BF16)


def _scaled_mm(
    a: Tensor, a_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, fast: bool = False
) -> Tensor:
    """fast: sums in the tensor cores' own precision alone."""
    scales = {"scale_a": a_scale, "scale_b": scale.view(1, -1)}
    return torch._scaled_mm(
        a, weight.t(), **scales, bias=bias.to(BF16), out_dtype=BF16, use_fast_accum=fast
    )


def _add(y: Tensor, x: Tensor, gate: Tensor, add: bool) -> Tensor:
    return x.addcmul_(y, gate) if add else y  # y: bf16, which the addition widens by itself


def values_of_keys(n: int, heads: int, pv: str, device: str) -> tuple[Tensor, Tensor | None]:
    """Random values of n keys as attention takes them, and their scales if they have any."""
    values = torch.randn(n, heads * HEAD_DIM, device=device, dtype=BF16)
    if not STORED_VALUES[pv].scaled:
        return values, None
    tiles = math.ceil(n / 64)
    stored = torch.empty(heads, HEAD_DIM, tiles * 64, device=device, dtype=PV_DTYPES[pv])
    scale = torch.empty(heads, tiles, HEAD_DIM, 2, device=device)
    ops.quantize_values(values, stored, scale)
    return stored, scale


def attention_bench(m: int, n: int, heads: int = HEADS, device: str = "cuda") -> Bench:
    def codes(pv: str) -> Run:
        q, k = (
            codes_of(heads * rows, HEAD_DIM, device).view(heads, rows, HEAD_DIM) for rows in (m, n)
        )
        padded = math.ceil(n / 64) * 64
        q_scale = scales_of(heads * m, device).view(heads, m)
        k_scale = scales_of(heads * padded, device).view(heads, padded)[:, :n]
        v, v_scale = values_of_keys(n, heads, pv, device)
        out = torch.empty(m, heads * HEAD_DIM, device=device, dtype=BF16)
        return lambda _: ops.attention_int8(q, q_scale, k, k_scale, v, v_scale, out)

    def floats() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            torch.randn(1, heads, rows, HEAD_DIM, device=device, dtype=BF16) for rows in (m, n, n)
        )
        return q, k, v

    def sdpa(backend: SDPBackend) -> Run:
        q, k, v = floats()

        def run(_: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    def sage() -> Run:
        attend = import_module("sageattention").sageattn
        q, k, v = floats()
        return lambda _: attend(q, k, v, tensor_layout="HND", is_causal=False)

    providers: dict[str, Callable[[], Run]] = {
        f"lowvram int8, PV {pv}": partial(codes, pv) for pv in pv_choices(_arch(device))
    }
    names = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"]
    if n <= TEXT_TOKENS:
        names.append("MATH")  # it holds all M * N logits of every head
    for name in names:
        backend = getattr(SDPBackend, name)
        providers[f"SDPA {name.split('_')[0].lower()}"] = partial(sdpa, backend)
    if find_spec("sageattention"):
        providers[f"sageattention {version('sageattention')}"] = sage
    return Bench(
        "attention",
        f"{m} queries, {n} keys, {heads} heads",
        4.0 * m * n * heads * HEAD_DIM,
        "TOPS",
        "bf16",
        providers,
    )


def row_benches(m: int, dim: int = 5120, ffn: int = 13824, device: str = "cuda") -> Iterator[Bench]:
    """The fused element-wise ops; bytes are those that must move: one read of x, one write of the
    codes.
    """

    def run(
        op: str, width: int, x_dtype: torch.dtype, code: torch.dtype, **kwargs: object
    ) -> Callable[[], Run]:
        def prepare() -> Run:
            inputs = [torch.randn(m, width, device=device, dtype=x_dtype) for _ in range(SETS)]
            out, scale = (
                torch.empty(m, width, device=device, dtype=code),
                torch.empty(m, 1, device=device),
            )
            vectors = _vectors(width, device) if op == "adaln_quantize" else ()
            function = getattr(ops, op)
            return lambda i: function(inputs[i % SETS], *vectors, out, scale, **kwargs)

        return prepare

    for rotated in (True, False):
        suffix = ", rotated" if rotated else ""
        for op, width, dtype, extra in (
            ("adaln_quantize", dim, torch.float32, {"eps": 1e-6}),
            ("quantize_rows", dim, BF16, {}),
            ("gelu_quantize", ffn, BF16, {}),
        ):
            moved = float(m * width * (dtype.itemsize + 1))
            providers = {
                "lowvram int8": run(op, width, dtype, torch.int8, rotated=rotated, **extra)
            }
            if not rotated:  # e4m3 never is, in a model
                providers["lowvram fp8"] = run(op, width, dtype, E4M3, rotated=False, **extra)
            yield Bench(f"{op}{suffix}", f"M={m} K={width}", moved, "GB/s", "copy", providers)
    yield Bench(
        "rms_rope_quantize",
        f"M={m} K={dim}",
        float(m * dim * 3),
        "GB/s",
        "copy",
        {"lowvram int8": lambda: _rms_rope(m, dim, device)},
    )
    for pv in pv_choices(_arch(device)):
        if not STORED_VALUES[pv].scaled:
            continue
        code = PV_DTYPES[pv]
        moved = float(m * dim * (BF16.itemsize + code.itemsize))
        providers = {f"lowvram {pv}": partial(_values, m, dim, device, code)}
        yield Bench("quantize_values", f"M={m} K={dim} {pv}", moved, "GB/s", "copy", providers)


def _arch(device: str) -> str:
    return architecture(torch.device(device)) if device == "cuda" else INTERPRETER


def _rms_rope(m: int, dim: int, device: str) -> Run:
    heads = dim // HEAD_DIM
    inputs = [torch.randn(m, dim, device=device, dtype=BF16) for _ in range(SETS)]
    angles, weight = torch.randn(m, HEAD_DIM // 2, device=device), torch.ones(dim, device=device)
    cos, sin, smoothing = angles.cos(), angles.sin(), torch.randn(heads, HEAD_DIM, device=device)
    out, scale = (
        torch.empty(heads, m, HEAD_DIM, device=device, dtype=torch.int8),
        torch.empty(heads, m, device=device),
    )
    return lambda i: ops.rms_rope_quantize(
        inputs[i % SETS], weight, cos, sin, smoothing, out, scale, eps=1e-6
    )


def _values(m: int, dim: int, device: str, code: torch.dtype) -> Run:
    heads, tiles = dim // HEAD_DIM, math.ceil(m / 64)
    inputs = [torch.randn(m, dim, device=device, dtype=BF16) for _ in range(SETS)]
    out = torch.empty(heads, HEAD_DIM, tiles * 64, device=device, dtype=code)
    scale = torch.empty(heads, tiles, HEAD_DIM, 2, device=device)
    return lambda i: ops.quantize_values(inputs[i % SETS], out, scale)


def codes_of(rows: int, columns: int, device: str, code: torch.dtype = torch.int8) -> Tensor:
    if code == torch.int8:
        return torch.randint(-127, 128, (rows, columns), device=device, dtype=torch.int8)
    return (torch.randn(rows, columns, device=device, dtype=BF16) * 100).clamp_(-448, 448).to(E4M3)


def scales_of(rows: int, device: str) -> Tensor:
    return torch.rand(rows, 1, device=device) * 0.01 + 0.001


def _vectors(width: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(width, device=device), torch.randn(width, device=device)


def all_benches(tokens: tuple[int, ...] = TOKENS, device: str = "cuda") -> Iterator[Bench]:
    for m in tokens:
        for name, (n, k) in LINEARS.items():
            yield linear_bench(name, m, n, k, device)
        yield gelu_bench(m, device=device)
    for n in tokens[-2:]:
        yield attention_bench(n, n, device=device)
    yield attention_bench(tokens[-1], TEXT_TOKENS, device=device)
    for m in tokens[-2:]:
        yield from row_benches(m, device=device)
