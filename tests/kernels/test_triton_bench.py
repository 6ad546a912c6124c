"""The benchmarks run from end to end on a CPU at toy sizes, and a quantized block is as close to fp32 as it must be."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types
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
import plots  # noqa: E402
import tune  # noqa: E402


def test_an_int8_block_is_close_to_fp32() -> None:
    """Cosine 0.9995 at least, of the block's output and of what it adds; channels 20 times as large as the others among its inputs."""
    found = {result.provider: result for result in bench_block.results(tiny_config(), (3, 6, 8), ("int8", "int8-plain", "fp8"), "cpu")}
    assert set(found) == {"diffusers bf16", "lowvram int8", "lowvram int8-plain", "lowvram fp8"}
    assert found["lowvram int8"].cosine >= 0.9995
    assert found["lowvram int8"].update_cosine >= 0.9995
    assert found["lowvram int8"].update_cosine > found["lowvram int8-plain"].update_cosine > found["lowvram fp8"].update_cosine > 0.995


def test_p18_an_int8_block_of_the_models_proportions_is_close_to_fp32() -> None:
    """Heads of 128, 512 tokens, a quarter of the model's width: cosine 0.9995 at least, of the output and of what the block adds."""
    config = tiny_config(dim=1280, ffn_dim=3584, num_heads=10, text_len=128)
    _, block = bench_block.results(config, (2, 16, 16), ("int8",), "cpu")
    assert block.provider == "lowvram int8"
    assert min(block.cosine, block.update_cosine) >= 0.9995
    assert block.relative_rmse <= 0.01


def test_rows_have_rates_and_go_into_a_table_a_file_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benches = [bench_kernels.linear_bench("ffn.2 +=", 8, 32, 64, "cpu"), bench_kernels.attention_bench(4, 70, 2, "cpu")]
    benches += [bench_kernels.gelu_bench(8, 256, 64, "cpu"), *bench_kernels.row_benches(4, 256, 512, "cpu")]
    peaks = bench_timing.peaks(64, 4096, "cpu")
    assert set(peaks) == {"bf16", "int8", "copy"}
    assert min(peaks.values()) > 0
    rows = [row for one in benches for row in bench_kernels.rows_of(one, peaks, "cpu")]
    providers = {(row.op, row.provider) for row in rows}
    assert ("linear ffn.2 +=", "lowvram int8") in providers
    assert ("linear ffn.2 +=", "torch bf16") in providers
    assert {name for op, name in providers if op == "attention"} >= {
        "lowvram int8, PV int8",
        "lowvram int8, PV fp16",
        "lowvram int8, PV fp8",
    }
    assert {name for op, name in providers if "GELU" in op} == {
        "lowvram int8, GELU with the rows", "lowvram int8, GELU in the product", "torch bf16"
    }  # fmt: skip
    assert all(row.share > 0 for row in rows)
    assert {row.op for row in rows} >= {"adaln_quantize, rotated", "gelu_quantize", "rms_rope_quantize", "quantize_values"}
    assert all(row.p20_ms <= row.median_ms <= row.p80_ms and row.rate > 0 for row in rows)
    bench_timing.write_csv(tmp_path / "kernels.csv", rows)
    plots.write_svg(tmp_path / "kernels.svg", plots.bars("GPU", bench_timing.rate_bars(rows)))
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "kernels.svg").read_text().count("#2266cc") == sum(row.provider.startswith("lowvram") for row in rows)
    assert bench_timing.table(rows).count("\n") == len(rows) + 1


def test_the_table_lists_every_op_at_every_shape() -> None:
    """The five products of a block at three numbers of tokens, attention over 32,760 and 75,600 keys and over the text."""
    benches = list(bench_kernels.all_benches(device="cpu"))
    for name, (n, k) in bench_kernels.LINEARS.items():
        for m in (8192, 32760, 75600):
            assert any(one.op == f"linear {name}" and one.shape == f"M={m} N={n} K={k}" for one in benches)
    shapes = {one.shape for one in benches if one.op == "attention"}
    assert {"32760 queries, 32760 keys, 40 heads", "75600 queries, 75600 keys, 40 heads", "75600 queries, 512 keys, 40 heads"} == shapes
    for one in benches:
        names = set(one.providers)
        if one.op.startswith("linear"):
            assert names >= {"lowvram int8", "lowvram fp8", "torch bf16", "torch._int_mm + rescale", "torch._scaled_mm"}
        if one.op == "attention":
            assert names >= {"SDPA cudnn", "SDPA flash", "SDPA efficient"}


@pytest.mark.parametrize(("package", "op"), [("sageattention", "attention"), ("comfy_kitchen", "linear q")])
def test_installed_peers_are_measured_and_named_with_their_version(monkeypatch: pytest.MonkeyPatch, package: str, op: str) -> None:
    """Stand-ins with the packages' own signatures: sageattention 1.0.6, comfy-kitchen's public `int8_linear`."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):  # type: ignore[no-untyped-def]
        assert tensor_layout == "HND"
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale)

    def int8_linear(x, weight, weight_scale, bias=None, out_dtype=None, convrot=False, convrot_groupsize=256):  # type: ignore[no-untyped-def]
        return torch.nn.functional.linear(x.float(), weight.float() * weight_scale, bias.float()).to(out_dtype)

    module = types.SimpleNamespace(sageattn=sageattn, int8_linear=int8_linear)
    monkeypatch.setattr(bench_kernels, "find_spec", lambda name: name == package)
    monkeypatch.setattr(bench_kernels, "import_module", lambda name: module)
    monkeypatch.setattr(bench_kernels.metadata, "version", lambda name: "1.0.6")
    bench = bench_kernels.attention_bench(4, 70, 2, "cpu") if op == "attention" else bench_kernels.linear_bench("q", 8, 32, 64, "cpu")
    peer = [row for row in bench_kernels.rows_of(bench, {}, "cpu") if " 1.0.6" in row.provider]
    assert len(peer) == 1
    assert peer[0].rate > 0


def test_a_failing_peer_is_named_and_left_out_and_a_failing_kernel_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> bench_kernels.Run:
        raise RuntimeError("no such card\nmore")

    good = bench_kernels.linear_bench("q", 8, 32, 64, "cpu")
    peer = dataclasses.replace(good, providers={"torch bf16": good.providers["torch bf16"], "peer": fail})
    assert [row.provider for row in bench_kernels.rows_of(peer, {}, "cpu")] == ["torch bf16"]
    assert "peer: no such card" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no such card"):
        list(bench_kernels.rows_of(dataclasses.replace(good, providers={"lowvram int8": fail}), {}, "cpu"))


@pytest.mark.parametrize(("code", "said"), [(1, "a kernel disagrees"), (4, "tests/gpu could not run")])
def test_no_speed_is_reported_where_the_gate_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, said: str
) -> None:
    monkeypatch.setattr(bench, "require_cuda", lambda command: True)
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, code))
    monkeypatch.setattr(bench, "kernels", lambda options: pytest.fail("measured behind a red gate"))
    assert bench.main(["kernels"]) == 1
    assert said in capsys.readouterr().err


def test_green_gate_measures_with_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's refusal must stop the benchmark: the torch reference would be measured in its name."""
    monkeypatch.setattr(bench, "require_cuda", lambda command: True)
    monkeypatch.setattr(bench, "gate", lambda: True)
    monkeypatch.setattr(bench, "kernels", lambda options: 0 if os.environ["LOWVRAM_BACKEND"] == "triton" else 1)
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    assert bench.main(["kernels"]) == 0


def test_a_block_is_measured_with_every_product_of_attention() -> None:
    found = [result.provider for result in bench_block.results(tiny_config(), (1, 4, 8), ("int8",), "cpu", ("int8", "fp16", "fp8"))]
    assert found == ["diffusers bf16", "lowvram int8", "lowvram int8, PV fp16", "lowvram int8, PV fp8"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("main", "arguments"), [(bench.main, ["kernels"]), (bench.main, ["block"]), (tune.main, [])])
def test_without_a_gpu_nothing_is_measured_and_that_is_said(main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1  # type: ignore[operator]
    said = capsys.readouterr().out.strip()
    assert "no CUDA device here, nothing was measured" in said
    assert "\n" not in said
