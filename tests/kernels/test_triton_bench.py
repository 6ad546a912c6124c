"""The benchmarks run from end to end on a CPU at toy sizes, and a quantized block is as close to fp32 as it must be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import tiny_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench  # noqa: E402
import bench_block  # noqa: E402
import bench_kernels  # noqa: E402
import bench_timing  # noqa: E402
import tune  # noqa: E402


def test_an_int8_block_is_close_to_fp32() -> None:
    """Cosine 0.9995 at least, of the block's output and of what it adds; channels 20 times as large as the others among its inputs."""
    found = {result.provider: result for result in bench_block.results(tiny_config(), (3, 6, 8), ("int8", "int8-plain", "fp8"), "cpu")}
    assert set(found) == {"diffusers bf16", "lowvram int8", "lowvram int8-plain", "lowvram fp8"}
    assert found["lowvram int8"].cosine >= 0.9995
    assert found["lowvram int8"].update_cosine >= 0.9995
    assert found["lowvram int8"].update_cosine > found["lowvram int8-plain"].update_cosine > found["lowvram fp8"].update_cosine > 0.995


def test_rows_have_rates_and_go_into_a_table_a_file_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benches = [bench_kernels.linear_bench("ffn.2 +=", 8, 32, 64, "cpu"), bench_kernels.attention_bench(4, 70, 2, "cpu")]
    benches += bench_kernels.row_benches(4, 256, 512, "cpu")
    rows = [row for one in benches for row in bench_kernels.rows_of(one, {"int8": 1.0, "bf16": 1.0, "copy": 1.0}, "cpu")]
    providers = {(row.op, row.provider) for row in rows}
    assert ("linear ffn.2 +=", "lowvram int8") in providers
    assert ("linear ffn.2 +=", "torch bf16") in providers
    assert ("attention", "lowvram int8") in providers
    assert {row.op for row in rows} >= {"adaln_quantize, rotated", "gelu_quantize", "rms_rope_quantize", "quantize_values"}
    assert all(row.p20_ms <= row.median_ms <= row.p80_ms and row.rate > 0 for row in rows)
    bench_timing.write_csv(tmp_path / "kernels.csv", rows)
    bench_timing.write_plot(tmp_path / "kernels.svg", rows)
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "kernels.svg").read_text().count("#2266cc") == sum(row.provider.startswith("lowvram") for row in rows)
    assert bench_timing.table(rows).count("\n") == len(rows) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("main", "arguments"), [(bench.main, ["kernels"]), (bench.main, ["block"]), (tune.main, [])])
def test_without_a_gpu_nothing_is_measured_and_that_is_said(main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1  # type: ignore[operator]
    said = capsys.readouterr().out.strip()
    assert "no CUDA device here, nothing was measured" in said
    assert "\n" not in said
