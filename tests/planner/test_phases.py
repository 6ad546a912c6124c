"""The formulas of single phases at the real model's size; tests/planner/test_allocations.py holds
them against what runs allocate.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowvram.formats import FORMATS
from lowvram.planner import umt5, vae, wan
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import describe_plan
from lowvram.request import Workload
from lowvram.store.layout import component_layout
from lowvram.variants import T2V_A14B

HD = (1280, 720)


def test_the_text_encoder_streams_in_little_memory() -> None:
    """UMT5-XXL: two slots of a block of 24, one matrix in fp32, one prompt's activations; no table
    of 256,384 rows.
    """
    layout = component_layout("text_encoder", T2V_A14B, "int8")
    table = next(tensor.nbytes for tensor in layout.rest if tensor.name == "token_embedding.weight")
    assert table == 256_384 * 4096 * 2
    assert len(layout.blocks) == 24
    assert layout.block_bytes == pytest.approx(193e6, rel=0.01)
    vram, ram = umt5.text_bytes(Workload.of(T2V_A14B, "int8"), layout.block_bytes, 2)
    matrix = 4096 * 10240 * 4
    assert 2 * layout.block_bytes + matrix < vram < 0.7e9
    tokenizer = 256_384 * umt5.TOKENIZER_BYTES + umt5.TOKENIZER_PROCESS_BYTES
    assert ram == tokenizer > 2 * layout.block_bytes
    assert vram + ram < table


@pytest.mark.parametrize("format", FORMATS)
def test_temporaries_stay_small_whatever_the_chunk(format: str) -> None:
    workload = Workload.of(T2V_A14B, format, HD)
    sizes = {
        chunk: wan.loop_temporaries_bytes(workload, chunk, references=True)
        for chunk in (64, 1024, 8192, 65536)
    }
    assert sizes[8192] < 1.35 * sizes[1024], (
        "beside the angles of its tokens, a chunk adds nothing past the slices"
    )
    assert max(sizes[chunk] for chunk in (64, 1024, 8192)) < 0.4e9
    if format in ("int8", "int8-plain", "fp8"):
        kernels = wan.loop_temporaries_bytes(workload, 8192, references=False)
        assert kernels < sizes[8192]


def test_the_plan_lists_the_references_temporaries_where_they_run() -> None:
    def items(host: Host) -> dict[str, int]:
        return describe_plan(
            Workload.of(T2V_A14B, "int8", (832, 480), 81, 40),
            PlanChoice(1024, 2, 0, 0, False),
            host,
        ).items

    assert (
        items(Host.of("cpu"))["reference temporaries"] > items(Host.of("cuda"))["temporaries"] > 0
    )


def test_the_tile_follows_from_the_size_alone() -> None:
    assert [
        vae.vae_tile_pixels(*size) for size in ((64, 64), (256, 256), (272, 256), (1280, 720))
    ] == [0, 0, 256, 256]


def test_decoding_takes_a_tile_whatever_the_size_and_a_row_of_tiles_on_the_host() -> None:
    small, large = (
        vae.decode_bytes(Workload.of(T2V_A14B, "int8", size), 256)
        for size in ((832, 480), (1280, 720))
    )
    assert large[0] == pytest.approx(small[0], rel=0.05)
    frames = 81 * 1280 * 720 * 3
    assert frames + 81 * 256 * 1280 * 12 < large[1] < frames * 5, "the clip never exists as floats"
    wide = replace(T2V_A14B.vae, base_dim=192)
    narrow = vae.decoder_peak_values(T2V_A14B.vae, 32, 32)
    assert vae.decoder_peak_values(wide, 32, 32) == pytest.approx(2 * narrow, rel=0.01)
    assert vae.decoder_peak_values(T2V_A14B.vae, 32, 64) == pytest.approx(2 * narrow, rel=0.02)
