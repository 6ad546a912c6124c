"""One step of a whole tiny model with every kernel forced to Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels import dispatch

from tests.checkpoints import tiny_config
from tests.runs import make_store, pipeline_of, request_of

CONFIG = tiny_config(num_layers=1)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_one_step_gives_the_bits_of_the_reference_in_every_int8_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    pipeline = pipeline_of(make_store(tmp_path, CONFIG, format))
    request = request_of(pipeline, steps=1)
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    expected = pipeline.generate(request).frames
    monkeypatch.setenv("LOWVRAM_BACKEND", "triton")
    linear, reference = dispatch.quantized_linear, dispatch.OPS["quantized_linear"].reference
    compared = []

    def both(*args: Any, **kwargs: Any) -> None:
        out = args[5]
        other = out.clone()
        reference(*args[:5], other, **kwargs)
        linear(*args, **kwargs)
        compared.append(torch.equal(out, other) if format == "int8" else torch.allclose(out.float(), other.float(), rtol=0.01, atol=1e-3))

    monkeypatch.setattr(dispatch, "quantized_linear", both)
    frames = pipeline.generate(request).frames
    assert len(compared) >= 9 * CONFIG.dit.num_layers
    assert all(compared)
    apart = (frames.int() - expected.int()).abs()
    assert float(apart.float().mean()) < 0.5, "grey levels of 255"
