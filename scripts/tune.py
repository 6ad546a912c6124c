"""Measures candidate tiles of the GEMM and of attention on the GPU at hand and prints the best for
`lowvram_kernels/tuning.py`.

    python -m scripts.tune [--tokens 32760] [--only attention] [--quick]

Every candidate must give the present tile's result before its time counts: int8 products its bits,
attention within 0.1 %, e4m3 1 %. The best so far is printed as it is found, so a search that is cut
off loses none. Most of the time goes into compiling.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from lowvram_kernels import attention_int8_triton, quantized_linear_triton
from lowvram_kernels.tuning import (
    INTERPRETER,
    AttentionTile,
    LinearTile,
    architecture,
    attention_tile,
    pv_choices,
)

from scripts.bench.kernels import HEAD_DIM, HEADS, LINEARS, codes_of, scales_of, values_of_keys
from scripts.bench.timing import measure, reason, require_cuda

MODULES = "lowvram_kernels"
Tile = tuple[int | None, ...]
Candidates = Sequence[Tile]


class DeadDeviceError(RuntimeError):
    """The device answers no more: nothing that follows would be measured."""


@dataclass(frozen=True)
class Task:
    """A call whose tile is searched for. `target`: the function that its wrapper takes the tile
    from; `reset` puts `out` back.
    """

    name: str
    target: str
    run: Callable[[], object]
    reset: Callable[[], object]
    out: torch.Tensor
    tolerance: float  # relative; 0: the same bits


def linear_candidates(quick: bool = False) -> Iterator[LinearTile]:
    """quick: a ninth of them, large tiles alone."""
    sides, all_warps, all_stages = (
        ((128, 256), (8,), (3, 4)) if quick else ((64, 128, 256), (4, 8), (2, 3, 4, 5))
    )
    for block_m, block_n, block_k in itertools.product(sides, sides, (64, 128)):
        for warps, stages in itertools.product(all_warps, all_stages):
            if (
                64 * 64 < block_m * block_n <= 128 * 256
                and (block_m + block_n) * block_k * (stages - 1) <= 227 * 1024
            ):
                parts = 4 if block_m * block_n > 128 * 128 else 1
                yield LinearTile(block_m, block_n, block_k, warps, stages, parts)


def attention_candidates(pv: str, arch: str, quick: bool = False) -> Iterator[AttentionTile]:
    """quick: a quarter of them, 16 queries per warp alone."""
    present = attention_tile(arch, pv, HEAD_DIM)
    for block_m, warps, stages in itertools.product(
        (64, 128), (4, 8), (2, 3) if quick else (1, 2, 3, 4)
    ):
        if not quick or block_m == 16 * warps:
            yield present._replace(block_m=block_m, warps=warps, stages=stages)


# Tiles that compile without a spill and whose bound is near the present tile's: only a GPU can tell
# which is faster.
_OPEN_LINEARS = [
    LinearTile(256, 128, 128, 8, 3, parts=4),
    LinearTile(128, 256, 64, 8, 4, parts=4),
    LinearTile(128, 128, 128, 8, 4),
    LinearTile(128, 128, 64, 8, 4),
]


def open_candidates(arch: str) -> Iterator[tuple[str, str, Candidates]]:
    """(linear of a block or "attention", what is multiplied, tiles to measure beside the present
    one), for int8 and every product of attention.
    """
    linears = [LinearTile(64, 64, 128, 4, 1)] if arch == INTERPRETER else _OPEN_LINEARS
    for name in ("q",) if arch == INTERPRETER else ("q", "o +="):
        yield name, "int8", [quantized_linear_triton.tile_of(arch, "int8"), *linears]
    for pv in pv_choices(arch):
        present = attention_tile(arch, pv, HEAD_DIM)
        others = (
            [(128, 8, 2), (128, 8, 3), (128, 8, 4), (64, 4, 3)]
            if arch != INTERPRETER
            else [(32, 4, 1)]
        )
        tiles = [
            present._replace(block_m=rows, warps=warps, stages=stages)
            for rows, warps, stages in others
        ]
        yield "attention", pv, [present, *(tile for tile in tiles if tile != present)]


def linear_name(name: str, code: torch.dtype) -> str:
    return f"linear {name} {code}"


def linear_task(name: str, m: int, n: int, k: int, code: torch.dtype, device: str) -> Task:
    a, weight, a_scale, scale = (
        codes_of(m, k, device, code),
        codes_of(n, k, device, code),
        scales_of(m, device),
        scales_of(n, device),
    )
    bias, add = torch.randn(n, device=device), name.endswith("+=")
    out = torch.zeros(m, n, device=device, dtype=torch.float32 if add else torch.bfloat16)

    def run() -> None:
        quantized_linear_triton.quantized_linear(
            a, a_scale, weight, scale, bias, out, gate=bias if add else None, accumulate=add
        )

    target, tolerance = (
        f"{MODULES}.quantized_linear_triton.tile_of",
        0.0 if code == torch.int8 else 0.01,
    )
    return Task(linear_name(name, code), target, run, out.zero_, out, tolerance)


def attention_name(pv: str) -> str:
    return f"attention {pv}"


def attention_task(tokens: int, heads: int, pv: str, device: str) -> Task:
    tiles = -(-tokens // 64)
    q, k = (
        codes_of(heads * tokens, HEAD_DIM, device).view(heads, tokens, HEAD_DIM) for _ in range(2)
    )
    v, v_scale = values_of_keys(tokens, heads, pv, device)
    q_scale = scales_of(heads * tokens, device).view(heads, tokens)
    k_scale = scales_of(heads * tiles * 64, device).view(heads, -1)[:, :tokens]
    out = torch.zeros(tokens, heads * HEAD_DIM, device=device, dtype=torch.bfloat16)

    def run() -> None:
        attention_int8_triton.attention_int8(q, q_scale, k, k_scale, v, v_scale, out)

    return Task(
        attention_name(pv),
        f"{MODULES}.attention_int8_triton.attention_tile",
        run,
        out.zero_,
        out,
        1e-3,
    )


def search(
    task: Task, candidates: Candidates, device: str = "cuda", repeats: int = 10
) -> list[tuple[float, Tile]]:
    """(ms, tile), fastest first, of the candidates that run and agree with the present tile; says
    why the others are left out.

    Raises `DeadDeviceError` where a candidate breaks the device.
    """
    found: list[tuple[float, Tile]] = []
    for number, median, candidate in tried(task, candidates, device, repeats):
        if not found or median < min(found)[0]:
            print(
                f"{task.name}: best of {number} of {len(candidates)}: {median:.3f} ms  {candidate}",
                flush=True,
            )
        found.append((median, candidate))
    return sorted(found, key=lambda pair: pair[0])


def tried(
    task: Task, candidates: Candidates, device: str = "cuda", repeats: int = 10
) -> Iterator[tuple[int, float, Tile]]:
    """(how many were tried, ms, tile) of each candidate that runs and agrees, as it is measured.
    Raises as `search` does.
    """
    try:
        task.reset()
        task.run()
        expected = task.out.float().clone()
        # waits for the device: a fault shows here, not at the first candidate
        size = float(expected.norm())
    except Exception as error:
        print(
            f"{task.name}: the present tile does not run, so nothing can be compared with it: "
            f"{reason(error)}",
            flush=True,
        )
        _require_alive(f"{task.name}, the present tile", device)
        return
    for number, candidate in enumerate(candidates, 1):
        with mock.patch(task.target, return_value=candidate):
            try:
                task.reset()
                task.run()
                difference = float((task.out.float() - expected).norm()) / size
                if not difference <= task.tolerance:
                    print(
                        f"{task.name} {candidate}: another result (relative difference "
                        f"{difference:.1e}), left out",
                        flush=True,
                    )
                    continue
                median = measure(lambda _: task.run(), repeats=repeats, device=device)[1]
            except Exception as error:
                print(f"{task.name} {candidate}: {reason(error)[:100]}", flush=True)
                _require_alive(f"{task.name} {candidate}", device)
                continue
        yield number, median, candidate


def _require_alive(culprit: str, device: str) -> None:
    """After a fault a CUDA context refuses everything, which would read as a failure of every later
    candidate.
    """
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeadDeviceError(
            f"{culprit} broke the device ({reason(error)}); nothing after it can be measured: "
            f"leave that tile out and start again"
        ) from error


def jobs(
    tokens: int, device: str, only: str = "", quick: bool = False
) -> list[tuple[Callable[[], Task], Candidates]]:
    """What makes each task whose name contains `only`, with its candidates. A task holds its
    inputs, so make one at a time.
    """
    arch = architecture(torch.device(device)) if device == "cuda" else INTERPRETER
    found: list[tuple[str, Callable[[], Task], Candidates]] = []
    for name, (n, k) in LINEARS.items():
        for code in (torch.int8, torch.float8_e4m3fn):
            make = partial(linear_task, name, tokens, n, k, code, device)
            found.append((linear_name(name, code), make, list(linear_candidates(quick))))
    for pv in pv_choices(arch):
        make = partial(attention_task, tokens, HEADS, pv, device)
        found.append((attention_name(pv), make, list(attention_candidates(pv, arch, quick))))
    return [(make, candidates) for name, make, candidates in found if only in name]


def tasks(
    tokens: int, device: str, only: str = "", quick: bool = False
) -> Iterator[tuple[Task, Candidates]]:
    for make, candidates in jobs(tokens, device, only, quick):
        yield make(), candidates


def tune(tokens: int, device: str, only: str, quick: bool) -> int:
    """Searches each task and prints its five best and the time left; 1 where a task has no tile at
    the end.
    """
    total, done, without = (
        sum(len(candidates) for _, candidates in jobs(tokens, device, only, quick)),
        0,
        [],
    )
    begin = time.perf_counter()
    for task, candidates in tasks(tokens, device, only, quick):
        found = search(task, candidates, device)
        for median, tile in found[:5]:
            print(f"{task.name}: {median:.3f} ms  {tile}", flush=True)
        if not found:
            without.append(task.name)
        del task  # its inputs, before the next one's
        done += len(candidates)
        passed = time.perf_counter() - begin
        print(
            f"{done} of {total} candidates in {passed:.0f} s, about "
            f"{passed / done * (total - done):.0f} s left",
            flush=True,
        )
    if not done:
        print(f"tune.py: no task's name contains {only!r}", file=sys.stderr)
    if without:
        print(f"tune.py: no tile was found for {', '.join(without)}", file=sys.stderr)
    return 1 if without or not done else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument(
        "--only",
        default="",
        help="only tasks whose name contains this: linear q, float8, attention int8",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few candidates per task: large tiles, enough warps"
    )
    options = parser.parse_args(arguments)
    if not require_cuda("tune.py"):
        return 1
    try:
        return tune(options.tokens, "cuda", options.only, options.quick)
    except DeadDeviceError as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
