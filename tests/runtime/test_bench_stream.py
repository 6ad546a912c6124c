"""The streaming benchmark runs from end to end on a CPU at toy sizes: its rows, files and complaints."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from lowvram.config import T2V_A14B
from lowvram.memory.cards import find_card
from lowvram.memory.plan import Choice, Host
from tests.checkpoints import tiny_config
from tests.runs import CPU, plan_of

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench
import bench_stream
import random_store
from bench_stream import BenchPipeline, Case

MIB, GIB = 2**20, 2**30
HOST = Host(staged=True, context_bytes=0, process_bytes=GIB)
LAYERS = 24  # their slots take more than decoding does


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bench_stream.StreamRow], Path]:
    """Everything resident, as much as decoding takes anyway, and a budget that is too small."""
    folder = tmp_path_factory.mktemp("bench")
    config = tiny_config(num_layers=LAYERS)
    with random_store.write_random_store(folder / "store", config) as store:
        everything = BenchPipeline(store, CPU, 2 * GIB, 16 * GIB, HOST)
        request = bench_stream.request_of(everything, (64, 64), 9, 4)
        least = plan_of(everything, request, Choice(64, 2, 0, 0, False))
        budgets = [(2 * GIB, 16 * GIB), (least.peak_vram_bytes, 16 * GIB), (MIB, 16 * GIB)]
        found = bench_stream.run(
            store, [Case((64, 64), 9, 4, budgets)], CPU, folder / "stream-cpu", profile=find_card("RTX 3060 12GB").profile()
        )
    return found, folder


def test_rows_hold_times_peaks_and_one_digest(rows: tuple[list[bench_stream.StreamRow], Path]) -> None:
    found, _ = rows
    lowvram = [row for row in found if row.provider.startswith("lowvram")]
    assert lowvram[0].resident == LAYERS
    assert lowvram[1].resident is not None
    assert lowvram[1].resident < LAYERS
    for row in lowvram[:2]:
        assert row.step_s is not None
        assert row.step_s > 0
        assert len(row.steps_s.split()) == 4
        assert row.predicted_s is not None
        assert row.predicted_s > 0
        assert row.rates == "table"
        assert row.disk_gb_s is not None
        assert row.disk_gb_s > 0
        assert row.peak_vram_gb is not None
        assert row.planned_vram_gb is not None
        assert 0 < row.peak_vram_gb <= row.planned_vram_gb
    assert len({row.latents_sha256 for row in lowvram[:2]}) == 1
    assert lowvram[0].overhead == 0
    assert lowvram[2].step_s is None
    assert lowvram[2].note.startswith("not measured: 64x64 x 9 frames in int8: VRAM of")
    assert bench_stream.disagreements(found) == []


def test_diffusers_and_quanto_run_on_the_same_shapes(rows: tuple[list[bench_stream.StreamRow], Path]) -> None:
    others = {row.provider: row for row in rows[0] if not row.provider.startswith("lowvram")}
    assert others["diffusers bf16 resident"].step_s is not None
    assert others["diffusers optimum-quanto int8"].step_s is not None
    offloaded = others["diffusers bf16 group offloading, stream"]
    assert offloaded.step_s is None
    assert "needs a CUDA device" in offloaded.note


def test_csv_and_plots_show_what_was_measured(rows: tuple[list[bench_stream.StreamRow], Path]) -> None:
    found, folder = rows
    written = list(csv.DictReader((folder / "stream-cpu.csv").open(encoding="utf-8")))
    assert [row["provider"] for row in written] == [row.provider for row in found]
    assert written[2]["step_s"] == ""
    bars = ElementTree.parse(folder / "stream-cpu.svg").getroot().findall(".//{*}rect")
    assert len(bars) == 1 + sum(row.step_s is not None for row in found)
    timeline = ElementTree.parse(folder / "stream-cpu-timeline-64x64.svg").getroot()
    assert len(timeline.findall(".//{*}rect")) > 20


def test_the_switch_is_in_the_middle_of_the_steps(rows: tuple[list[bench_stream.StreamRow], Path], tmp_path: Path) -> None:
    from lowvram.sampling.denoise import block_schedule
    from lowvram.sampling.schedule import make_schedule

    with random_store.write_random_store(tmp_path / "store", tiny_config()) as store:
        pipeline = BenchPipeline(store, CPU, 2 * GIB, 16 * GIB, HOST)
        for steps in (2, 3, 4, 8):
            request = bench_stream.request_of(pipeline, (64, 64), 9, steps)
            visits = block_schedule(make_schedule("unipc", steps, request.shift), request, 1, True, 0)
            assert [name for name, _ in visits] == ["high_noise"] * (steps // 2) + ["low_noise"] * (steps - steps // 2)


def test_other_bits_and_exceeded_plans_are_complained_about(rows: tuple[list[bench_stream.StreamRow], Path]) -> None:
    first, second = rows[0][0], replace(rows[0][1], latents_sha256="0" * 64, peak_vram_gb=1e3)
    (changed,) = bench_stream.disagreements([first, second])
    assert "64x64: the budgets changed the latents" in changed
    assert any("VRAM 1000.000 GB of" in line for line in bench_stream.exceeded([first, second]))


def test_the_store_of_true_shapes_holds_both_experts() -> None:
    from lowvram.checkpoint.store_layout import component_layout

    layouts = [component_layout(name, random_store.bench_config(40), "int8") for name in ("high_noise", "low_noise", "text_encoder", "vae")]
    assert layouts[0].block_bytes == component_layout("high_noise", T2V_A14B, "int8").block_bytes
    assert sum(layout.total_bytes for layout in layouts) == pytest.approx(29.9e9, rel=0.02)
    options = bench.make_parser().parse_args(["stream"])
    pairs = bench_stream.budgets_of(options, 140 * 10**9)
    assert pairs[0] == (140 * 10**9, 40 * 10**9)
    assert len(pairs) == 1 + 4 * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["stream", "--layers", "1"]) == 1
    said = capsys.readouterr().out.strip()
    assert "no CUDA device here, nothing was measured" in said
    assert "\n" not in said
