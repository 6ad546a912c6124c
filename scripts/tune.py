"""Measures candidate tiles of the GEMM and of attention on the GPU at hand and prints the best for `lowvram_kernels/tuning.py`.

    python scripts/tune.py [--tokens 32760] [--only attention]

Every candidate must give the present tile's result before its time counts: int8 products its bits, attention within 0.1 %, e4m3 1 %.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from bench_kernels import HEAD_DIM, HEADS, LINEARS, codes_of, scales_of
from bench_timing import measure, require_cuda
from lowvram_kernels import attention_int8_triton, quantized_linear_triton
from lowvram_kernels.tuning import INTERPRETER, PV_DTYPES, AttentionTile, LinearTile, architecture, attention_tile, pv_choices

MODULES = "lowvram_kernels"


@dataclass(frozen=True)
class Task:
    """A call whose tile is searched for. `target`: the function that its wrapper takes the tile from; `reset` puts `out` back."""

    name: str
    target: str
    run: Callable[[], object]
    reset: Callable[[], object]
    out: torch.Tensor
    tolerance: float  # relative; 0: the same bits


def linear_candidates() -> Iterator[LinearTile]:
    for block_m, block_n, block_k in itertools.product((64, 128, 256), (64, 128, 256), (64, 128)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4, 5)):
            if 64 * 64 < block_m * block_n <= 128 * 256 and (block_m + block_n) * block_k * (stages - 1) <= 227 * 1024:
                yield LinearTile(block_m, block_n, block_k, warps, stages)


def attention_candidates(pv: str, arch: str) -> Iterator[AttentionTile]:
    present = attention_tile(arch, pv, HEAD_DIM)
    for block_m, warps, stages in itertools.product((64, 128), (4, 8), (1, 2, 3, 4)):
        yield present._replace(block_m=block_m, warps=warps, stages=stages)


def linear_task(name: str, m: int, n: int, k: int, code: torch.dtype, device: str) -> Task:
    a, weight, a_scale, scale = codes_of(m, k, device, code), codes_of(n, k, device, code), scales_of(m, device), scales_of(n, device)
    bias, add = torch.randn(n, device=device), name.endswith("+=")
    out = torch.zeros(m, n, device=device, dtype=torch.float32 if add else torch.bfloat16)

    def run() -> None:
        quantized_linear_triton.quantized_linear(a, a_scale, weight, scale, bias, out, gate=bias if add else None, accumulate=add)

    target, tolerance = f"{MODULES}.quantized_linear_triton.linear_tile", 0.0 if code == torch.int8 else 0.01
    return Task(f"linear {name} {code}", target, run, out.zero_, out, tolerance)


def attention_task(tokens: int, heads: int, pv: str, device: str) -> Task:
    tiles = -(-tokens // 64)
    q, k = (codes_of(heads * tokens, HEAD_DIM, device).view(heads, tokens, HEAD_DIM) for _ in range(2))
    v = codes_of(heads * HEAD_DIM, tiles * 64, device).view(heads, HEAD_DIM, -1)
    if pv != "int8":
        v = (v.to(torch.float16) / 127).to(PV_DTYPES[pv])
    q_scale, k_scale = (scales_of(heads * tokens, device).view(heads, tokens) for _ in range(2))
    v_scale = scales_of(heads * HEAD_DIM * tiles, device).view(heads, HEAD_DIM, tiles)
    out = torch.zeros(tokens, heads * HEAD_DIM, device=device, dtype=torch.bfloat16)

    def run() -> None:
        attention_int8_triton.attention_int8(q, q_scale, k, k_scale, v, v_scale, out)

    return Task(f"attention {pv}", f"{MODULES}.attention_int8_triton.attention_tile", run, out.zero_, out, 1e-3)


def search(task: Task, candidates: Sequence[tuple[int, ...]], device: str = "cuda", repeats: int = 10) -> list[tuple[float, object]]:
    """(ms, tile), fastest first, of the candidates that run and agree with the present tile; says why the others are left out."""
    task.reset()
    task.run()
    expected, found = task.out.clone(), []
    for candidate in candidates:
        with mock.patch(task.target, return_value=candidate):
            try:
                task.reset()
                task.run()
                error = float((task.out.float() - expected.float()).norm() / expected.float().norm())
                if error <= task.tolerance:
                    found.append((measure(lambda _: task.run(), repeats=repeats, device=device)[1], candidate))
                else:
                    print(f"{task.name} {candidate}: another result (relative difference {error:.1e}), left out")
            except Exception as error:
                print(f"{task.name} {candidate}: {(str(error) or repr(error)).splitlines()[0][:100]}")
    return sorted(found, key=lambda pair: pair[0])


def tasks(tokens: int, device: str) -> Iterator[tuple[Task, Sequence[tuple[int, ...]]]]:
    arch = architecture(torch.device(device)) if device == "cuda" else INTERPRETER
    for name, (n, k) in LINEARS.items():
        for code in (torch.int8, torch.float8_e4m3fn):
            yield linear_task(name, tokens, n, k, code, device), list(linear_candidates())
    for pv in pv_choices(arch):
        yield attention_task(tokens, HEADS, pv, device), list(attention_candidates(pv, arch))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--only", default="", help="only tasks whose name contains this")
    options = parser.parse_args(arguments)
    if not require_cuda("tune.py"):
        return 1
    for task, candidates in tasks(options.tokens, "cuda"):
        if options.only in task.name:
            for median, tile in search(task, candidates)[:5]:
                print(f"{task.name}: {median:.3f} ms  {tile}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
