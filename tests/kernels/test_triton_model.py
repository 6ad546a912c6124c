"""Runs whole models, a block and the search for tiles with all kernels in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels import ops
from lowvram_kernels.tuning import LinearTile
from lowvram_quantize.convert import quantize

from lowvram.demo.run import MODEL
from lowvram.pipeline import Pipeline
from lowvram.request import Request
from lowvram.store.reader import open_store
from scripts import tune
from scripts.bench import block as bench_block
from tests.helpers.checkpoints import tiny_config
from tests.helpers.runs import SMALL, make_store, pipeline_of, request_of

CONFIG = tiny_config(num_layers=1)


class Compared:
    """Runs `quantized_linear` on both backends; `same` has one entry per call."""

    def __init__(self, exact: bool) -> None:
        self.linear, self.reference = ops.quantized_linear, ops.OPS["quantized_linear"].reference
        self.exact = exact
        self.same: list[bool] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        out = args[5]
        other = out.clone()
        self.reference(*args[:5], other, **kwargs)
        self.linear(*args, **kwargs)
        self.same.append(
            torch.equal(out, other)
            if self.exact
            else torch.allclose(out.float(), other.float(), rtol=0.01, atol=1e-3)
        )


def one_step(
    pipeline: Pipeline, request: Request, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> tuple[Compared, float]:
    """Return the comparison and the mean difference of the frames, in grey levels of 255."""
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    expected = pipeline.generate(request).frames
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    compared = Compared(exact)
    monkeypatch.setattr(ops, "quantized_linear", compared)
    frames = pipeline.generate(request).frames
    return compared, float((frames.int() - expected.int()).abs().float().mean())


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_one_step_gives_the_bits_of_the_reference_in_every_int8_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    pipeline = pipeline_of(make_store(tmp_path, CONFIG, format))
    compared, apart = one_step(
        pipeline, request_of(pipeline, steps=1), monkeypatch, exact=format == "int8"
    )
    assert len(compared.same) >= 9 * CONFIG.dit.num_layers
    assert all(compared.same)
    assert apart < 0.5


def test_one_step_of_the_demo_gives_the_bits_of_the_reference_in_every_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model, quantized here: 64x64, 5 frames, 32 tokens, four blocks, heads of 64.

    Without guidance, to save time. Frames differ where a probability or a row's code rounds
    differently: by less than one of 255 grey levels in the mean.
    """
    quantize(MODEL, tmp_path / "model", "int8")
    with open_store(tmp_path / "model") as store:
        pipeline = pipeline_of(store)
        request = pipeline.request(
            "a red circle moves right on a blue background",
            steps=1,
            guidance_high=1.0,
            guidance_low=1.0,
            **(SMALL | {"frames": 5}),
        )
        compared, apart = one_step(pipeline, request, monkeypatch, exact=True)
        assert store.config.dit.head_dim == 64
        assert len(compared.same) >= 9 * store.config.dit.num_layers
    assert all(compared.same)
    assert apart < 1


def test_a_block_on_triton_is_close_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosine of at least 0.9995 of an int8 block's output and of what it adds to its input.

    The inputs have outlier channels. With e4m3 values the limit of what it adds is lower.
    """
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    found = {
        result.provider: result
        for result in bench_block.results(
            tiny_config(), (1, 7, 10), ("int8",), "cpu", ("int8", "fp8")
        )
    }
    for name, limit in (("lowvram int8", 0.9995), ("lowvram int8, PV fp8", 0.999)):
        assert found[name].cosine >= 0.9995
        assert found[name].update_cosine >= limit


def test_tiles_are_searched_among_candidates_that_agree(capsys: pytest.CaptureFixture[str]) -> None:
    """The search of `scripts/tune.py` at toy sizes; a tile with a wrong result is named."""
    task = tune.linear_task("ffn.2 +=", 40, 64, 96, torch.int8, "cpu")
    found = tune.search(
        task, [LinearTile(32, 32, 32, 4, 1), LinearTile(16, 64, 64, 4, 1)], "cpu", repeats=1
    )
    assert {tile for _, tile in found} == {
        LinearTile(32, 32, 32, 4, 1),
        LinearTile(16, 64, 64, 4, 1),
    }
    for pv in ("int8", "fp16", "fp8"):
        attention = tune.attention_task(40, 2, pv, "cpu")
        candidates = [
            tile
            for tile in tune.attention_candidates(pv, "interpreter")
            if tile.warps == 4 and tile.stages == 1
        ]
        assert len(tune.search(attention, candidates, "cpu", repeats=1)) == len(candidates) == 2
    other = dataclasses.replace(task, run=lambda: task.out.copy_(torch.rand_like(task.out)))
    assert tune.search(other, [LinearTile(32, 32, 32, 4, 1)], "cpu", repeats=1) == []
    assert "another result" in capsys.readouterr().out
    names = [task.name for task, _ in zip_tasks()]
    assert names[:2] == ["linear q torch.int8", "linear q torch.float8_e4m3fn"]


def zip_tasks() -> Any:
    return itertools.islice(tune.tasks(4, "cpu"), 2)
