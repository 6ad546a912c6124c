"""Measures candidate tiles of the GEMM and of attention on the GPU at hand and prints the best for `lowvram_kernels/tuning.py`.

    python scripts/tune.py [--tokens 32760]

Every candidate must give the bits of the present tile (e4m3: the same sums to 1 %) before its time counts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from bench_timing import measure, require_cuda

Prepared = tuple[Callable[[], object], torch.Tensor]  # a call, and the output that it writes


def linear_candidates() -> Iterator[tuple[int, int, int, int, int]]:
    for block_m, block_n, block_k in itertools.product((64, 128, 256), (64, 128, 256), (64, 128)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4, 5)):
            if 64 * 64 < block_m * block_n <= 128 * 256 and (block_m + block_n) * block_k * (stages - 1) <= 227 * 1024:
                yield block_m, block_n, block_k, warps, stages


def attention_candidates() -> Iterator[tuple[int, int, int]]:
    yield from itertools.product((64, 128), (4, 8), (1, 2, 3, 4))


def best(name: str, target: str, kind: type, candidates: Iterator[tuple[int, ...]], prepared: Prepared, exact: bool = True) -> None:
    """Prints the five fastest of `candidates`, patched into the function `target` of the kernel's module."""
    run, out = prepared
    run()
    expected, found = out.clone(), []
    for candidate in candidates:
        with mock.patch(target, return_value=kind(*candidate)):
            try:
                out.zero_()
                run()
                if torch.equal(out, expected) or (not exact and float((out - expected).norm() / expected.norm()) < 0.01):
                    found.append((measure(lambda _: run(), repeats=10)[1], candidate))
                else:
                    print(f"{name} {candidate}: another result, left out")
            except Exception as error:
                print(f"{name} {candidate}: {str(error).splitlines()[0][:100]}")
    for median, candidate in sorted(found)[:5]:
        print(f"{name}: {median:.3f} ms  {kind.__name__}{candidate}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32760)
    options = parser.parse_args(arguments)
    if not require_cuda("tune.py"):
        return 1
    from bench_kernels import LINEARS, _codes, _scales
    from lowvram_kernels import attention_int8_triton, quantized_linear_triton
    from lowvram_kernels.tuning import AttentionTile, LinearTile

    m = options.tokens

    def linear(n: int, k: int, code: torch.dtype, add: bool) -> Prepared:
        a, weight, a_scale, scale = _codes(m, k, "cuda", code), _codes(n, k, "cuda", code), _scales(m, "cuda"), _scales(n, "cuda")
        bias = torch.randn(n, device="cuda")
        out = torch.zeros(m, n, device="cuda", dtype=torch.float32 if add else torch.bfloat16)
        residual = out.clone()

        def run() -> None:
            if add:
                out.copy_(residual)
            quantized_linear_triton.quantized_linear(a, a_scale, weight, scale, bias, out, gate=bias if add else None, accumulate=add)

        return run, out

    def attention() -> Prepared:
        tiles = -(-m // 64)
        q, k = (_codes(40 * m, 128, "cuda").view(40, m, 128) for _ in range(2))
        v = _codes(40 * 128, tiles * 64, "cuda").view(40, 128, -1)
        q_scale, k_scale = (_scales(40 * m, "cuda").view(40, m) for _ in range(2))
        v_scale = _scales(40 * 128 * tiles, "cuda").view(40, 128, tiles)
        out = torch.empty(m, 5120, device="cuda", dtype=torch.bfloat16)
        return lambda: attention_int8_triton.attention_int8(q, q_scale, k, k_scale, v, v_scale, out), out

    for name, (n, k) in LINEARS.items():
        for code in (torch.int8, torch.float8_e4m3fn):
            prepared = linear(n, k, code, name.endswith("+="))
            target = "lowvram_kernels.quantized_linear_triton.linear_tile"
            best(f"{name} {code}", target, LinearTile, linear_candidates(), prepared, exact=code == torch.int8)
    best("attention", "lowvram_kernels.attention_int8_triton.attention_tile", AttentionTile, attention_candidates(), attention())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
