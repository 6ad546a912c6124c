"""The speed of single kernels in `bench all`: beside their peers at 480p, at other sizes, and
with the few other tiles worth a try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from lowvram_kernels.tuning import INTERPRETER, architecture

from scripts import tune
from scripts.bench.kernels import (
    HEADS,
    LINEARS,
    TEXT_TOKENS,
    Bench,
    attention_bench,
    gelu_bench,
    linear_bench,
    row_benches,
    row_of,
)
from scripts.bench.machine import peaks_of
from scripts.bench.results import problem_of
from scripts.bench.steps import Context, LeftOut, Row, Unit, missing_packages

TOKENS_480P, TOKENS_720P, TOKENS_CHUNK = 32760, 75600, 8192
# are measured where they are installed, and named where they are not
PEERS = ("sageattention", "comfy_kitchen")
WARM_TOKENS = 72  # like 32,760 divisible by 8 and not by 16: Triton compiles the same variants


@dataclass(frozen=True)
class Shapes:
    """What is measured: A14B's, or toys in a rehearsal. device: cuda or cpu; linears: (N, K) by
    name.
    """

    device: str
    tokens: int
    linears: dict[str, tuple[int, int]]
    heads: int
    dim: int
    ffn: int
    row_tokens: int
    repeats: int

    @classmethod
    def of(cls, context: Context, tokens: int = TOKENS_480P, warm: bool = False) -> Shapes:
        if context.rehearse:
            # whose outputs are rotated
            toys = dict.fromkeys(LINEARS, (64, 256)) | {"ffn.0": (256, 256)}
            return cls("cpu", 70, toys, 1, 256, 512, 4, 2)
        tokens = WARM_TOKENS if warm else tokens
        return cls("cuda", tokens, LINEARS, HEADS, 5120, 13824, tokens, 20)

    def attention(self) -> Bench:
        return attention_bench(self.tokens, self.tokens, self.heads, self.device)

    def text_attention(self) -> Bench:
        return attention_bench(self.tokens, min(self.tokens, TEXT_TOKENS), self.heads, self.device)

    def products(self) -> list[Bench]:
        found = [
            linear_bench(name, self.tokens, n, k, self.device)
            for name, (n, k) in self.linears.items()
        ]
        return [*found, gelu_bench(self.row_tokens, *self.linears["ffn.0"], self.device)]

    def rows(self) -> list[Bench]:
        return list(row_benches(self.row_tokens, self.dim, self.ffn, self.device))


def own_calls(shapes: Shapes) -> dict[str, Callable[[], None]]:
    """By name: every call of a group of lowvram's own kernels once."""

    def run(benches: Callable[[], Sequence[Bench]]) -> None:
        for bench in benches():
            for name, prepare in bench.providers.items():
                if name.startswith("lowvram"):
                    prepare()(0)

    groups: dict[str, Callable[[], Sequence[Bench]]] = {
        "attention": lambda: [shapes.attention()],
        "linears": lambda: shapes.products()[:3],
        "linears of the FFN": lambda: shapes.products()[3:],
        "rows": shapes.rows,
    }
    return {name: partial(run, benches) for name, benches in groups.items()}


def speed_units(context: Context) -> Iterator[Unit]:
    """In order of worth: attention, the linears, what is element-wise, attention over the text."""
    shapes = Shapes.of(context)
    for bench in [shapes.attention(), *shapes.products(), *shapes.rows(), shapes.text_attention()]:
        yield from units_of(bench, shapes, context)
    for package in missing_packages(PEERS):
        yield Unit(f"a peer, {package}", lambda: iter(()), (package,))


def more_units(context: Context) -> Iterator[Unit]:
    """720p, then the chunks in which a small budget computes."""
    for tokens in (TOKENS_720P, TOKENS_CHUNK):
        shapes = Shapes.of(context, tokens)
        for bench in ([shapes.attention()] if tokens == TOKENS_720P else []) + shapes.products():
            yield from units_of(
                bench, shapes, context, "" if not context.rehearse else f" for {tokens}"
            )


def units_of(bench: Bench, shapes: Shapes, context: Context, suffix: str = "") -> Iterator[Unit]:
    """A unit per provider, lowvram's first."""
    for name in sorted(bench.providers, key=lambda name: not name.startswith("lowvram")):
        yield Unit(
            f"{bench.op} {bench.shape}{suffix}, {name}",
            partial(measured, bench, name, shapes, context),
        )


def measured(bench: Bench, name: str, shapes: Shapes, context: Context) -> Iterator[Row]:
    try:
        row = asdict(row_of(bench, name, peaks_of(context), shapes.device, shapes.repeats))
    except Exception as error:
        if name.startswith("lowvram"):
            raise
        # a peer that does not run here is no failure of ours
        raise LeftOut(problem_of(error)) from error
    yield {key: value for key, value in row.items() if key not in context.facts}


def tile_units(context: Context) -> Iterator[Unit]:
    """Few tiles, beside the present ones."""
    shapes = Shapes.of(context)
    arch = INTERPRETER if context.rehearse else architecture(torch.device(context.device))
    for name, kind, candidates in tune.open_candidates(arch):
        yield Unit(f"tiles of {name} {kind}", partial(searched, name, kind, candidates, shapes))


def searched(name: str, kind: str, candidates: tune.Candidates, shapes: Shapes) -> Iterator[Row]:
    """A row per tile that gives the present tile's result, the present one first."""
    if name == "attention":
        task = tune.attention_task(shapes.tokens, shapes.heads, kind, shapes.device)
    else:
        task = tune.linear_task(
            name, shapes.tokens, *shapes.linears[name], torch.int8, shapes.device
        )
    present: float | None = None
    measured = False
    for _, median, tile in tune.tried(task, candidates, shapes.device, min(shapes.repeats, 10)):
        measured, present = True, median if tile == candidates[0] else present
        gain = None if present is None else present / median - 1
        yield {
            "name": task.name,
            "tile": list(tile),
            "median_ms": median,
            "present": tile == candidates[0],
            "gain": gain,
        }
    if not measured:
        raise NoTileError(f"no tile of {task.name} runs and agrees with the present one")


class NoTileError(Exception):
    """Not even the present tile ran."""
