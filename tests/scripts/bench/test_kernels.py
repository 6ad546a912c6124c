"""Runs the benchmarks on a CPU at toy sizes and checks the error of a quantized block."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lowvram_kernels.tuning import LinearTile
from torch import Tensor
from triton.runtime.errors import OutOfResources

from scripts import tune
from scripts.bench import block as bench_block
from scripts.bench import commands as bench_commands
from scripts.bench import kernels as bench_kernels
from scripts.bench import plots
from scripts.bench import timing as bench_timing
from tests.helpers.checkpoints import tiny_config

SCRIPTS = Path(__file__).parents[3] / "scripts"


def test_an_int8_block_is_close_to_fp32() -> None:
    """Cosine of at least 0.9995, of the block's output and of what the block adds to its input.

    Some input channels are 20 times as large as the others.
    """
    found = {
        result.provider: result
        for result in bench_block.results(
            tiny_config(), (3, 6, 8), ("int8", "int8-plain", "fp8"), "cpu"
        )
    }
    assert set(found) == {"diffusers bf16", "lowvram int8", "lowvram int8-plain", "lowvram fp8"}
    assert found["lowvram int8"].cosine >= 0.9995
    assert found["lowvram int8"].update_cosine >= 0.9995
    assert (
        found["lowvram int8"].update_cosine
        > found["lowvram int8-plain"].update_cosine
        > found["lowvram fp8"].update_cosine
        > 0.995
    )


def test_p18_an_int8_block_of_the_models_proportions_is_close_to_fp32() -> None:
    """Cosine of at least 0.9995, of the output and of what the block adds to its input.

    Heads of 128, 512 tokens, a quarter of the model's width.
    """
    config = tiny_config(dim=1280, ffn_dim=3584, num_heads=10, text_len=128)
    _, block = bench_block.results(config, (2, 16, 16), ("int8",), "cpu")
    assert block.provider == "lowvram int8"
    assert min(block.cosine, block.update_cosine) >= 0.9995
    assert block.relative_rmse <= 0.01


def test_rows_have_rates_and_go_into_a_table_a_file_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benches = [
        bench_kernels.linear_bench("ffn.2 +=", 8, 32, 64, "cpu"),
        bench_kernels.attention_bench(4, 70, 2, "cpu"),
    ]
    benches += [
        bench_kernels.gelu_bench(8, 256, 64, "cpu"),
        *bench_kernels.row_benches(4, 256, 512, "cpu"),
    ]
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
    assert {name for op, name in providers if op == "quantize_values"} == {
        "lowvram int8",
        "lowvram fp16",
        "lowvram fp8",
    }
    for op in ("adaln_quantize", "quantize_rows", "gelu_quantize"):
        assert {name for found, name in providers if found == op} == {"lowvram int8", "lowvram fp8"}
        assert {name for found, name in providers if found == f"{op}, rotated"} == {"lowvram int8"}
    assert {name for op, name in providers if "GELU" in op} == {
        "lowvram int8, GELU with the rows", "lowvram int8, GELU in the product", "torch bf16"
    }  # fmt: skip
    assert all(row.share > 0 for row in rows)
    assert {row.op for row in rows} >= {
        "adaln_quantize, rotated",
        "gelu_quantize",
        "rms_rope_quantize",
        "quantize_values",
    }
    assert all(row.p20_ms <= row.median_ms <= row.p80_ms and row.rate > 0 for row in rows)
    bench_timing.write_csv(tmp_path / "kernels.csv", rows)
    plots.write_svg(tmp_path / "kernels.svg", plots.bars("GPU", bench_timing.rate_bars(rows)))
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "kernels.svg").read_text().count("#2266cc") == sum(
        row.provider.startswith("lowvram") for row in rows
    )
    assert bench_timing.table(rows).count("\n") == len(rows) + 1


def test_the_table_lists_every_op_at_every_shape() -> None:
    """Products at three numbers of tokens; attention over 32,760 and 75,600 keys and the text."""
    benches = list(bench_kernels.all_benches(device="cpu"))
    for name, (n, k) in bench_kernels.LINEARS.items():
        for m in (8192, 32760, 75600):
            assert any(
                one.op == f"linear {name}" and one.shape == f"M={m} N={n} K={k}" for one in benches
            )
    shapes = {one.shape for one in benches if one.op == "attention"}
    assert {
        "32760 queries, 32760 keys, 40 heads",
        "75600 queries, 75600 keys, 40 heads",
        "75600 queries, 512 keys, 40 heads",
    } == shapes
    for one in benches:
        names = set(one.providers)
        if one.op.startswith("linear"):
            assert names >= {
                "lowvram int8",
                "lowvram fp8",
                "torch bf16",
                "torch._int_mm + rescale",
                "torch._scaled_mm",
            }
            assert "torch._scaled_mm, fast accumulation" in names
        if one.op == "attention":
            assert names >= {"SDPA cudnn", "SDPA flash", "SDPA efficient"}
            assert ("SDPA math" in names) == ("512 keys" in one.shape), (
                "the logits of more keys would not fit"
            )


@pytest.mark.parametrize(
    ("package", "op"), [("sageattention", "attention"), ("comfy_kitchen", "linear q")]
)
def test_installed_peers_are_measured_and_named_with_their_version(
    monkeypatch: pytest.MonkeyPatch, package: str, op: str
) -> None:
    """Stubs with the signatures of the packages: sageattention 1.0.6 and comfy-kitchen's public
    `int8_linear`.
    """

    def sageattn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
    ) -> Tensor:
        assert tensor_layout == "HND"
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=sm_scale
        )

    def int8_linear(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        convrot: bool = False,
        convrot_groupsize: int = 256,
    ) -> Tensor:
        assert bias is not None
        assert out_dtype is not None
        return torch.nn.functional.linear(
            x.float(), weight.float() * weight_scale, bias.float()
        ).to(out_dtype)

    module = types.SimpleNamespace(sageattn=sageattn, int8_linear=int8_linear)
    monkeypatch.setattr(bench_kernels, "find_spec", lambda name: name == package)
    monkeypatch.setattr(bench_kernels, "import_module", lambda name: module)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.6")
    bench = (
        bench_kernels.attention_bench(4, 70, 2, "cpu")
        if op == "attention"
        else bench_kernels.linear_bench("q", 8, 32, 64, "cpu")
    )
    peer = [row for row in bench_kernels.rows_of(bench, {}, "cpu") if " 1.0.6" in row.provider]
    assert len(peer) == 1
    assert peer[0].rate > 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no such card\nmore"), "no such card"),
        (RuntimeError(), "RuntimeError()"),
        (AssertionError("\nheads of 128 alone"), "heads of 128 alone"),
        (
            OutOfResources(200, 100, "shared memory"),
            "out of resource: shared memory, Required: 200",
        ),
    ],
)
def test_a_failing_peer_is_named_and_left_out_and_a_failing_kernel_is_raised(
    capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def fail() -> bench_kernels.Run:
        raise error

    good = bench_kernels.linear_bench("q", 8, 32, 64, "cpu")
    peer = dataclasses.replace(
        good, providers={"peer": fail, "torch bf16": good.providers["torch bf16"]}
    )
    assert [row.provider for row in bench_kernels.rows_of(peer, {}, "cpu")] == ["torch bf16"]
    assert f"peer: not measured: {said}" in capsys.readouterr().out
    with pytest.raises(type(error)):
        list(
            bench_kernels.rows_of(
                dataclasses.replace(good, providers={"lowvram int8": fail}), {}, "cpu"
            )
        )


def test_peers_add_to_the_residual_without_a_copy_and_with_the_same_bits() -> None:
    x, y, gate = torch.randn(5, 64), torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(64)
    assert torch.equal(
        bench_kernels._add(y, x.clone(), gate, True), x.clone().addcmul_(y.float(), gate)
    )


def test_a_run_that_is_cut_off_keeps_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop() -> bench_kernels.Run:
        raise KeyboardInterrupt

    good = bench_kernels.linear_bench("q", 8, 32, 64, "cpu")
    last = dataclasses.replace(
        good, op="last", providers={"torch bf16": good.providers["torch bf16"], "peer": stop}
    )
    rows_of = bench_kernels.rows_of
    monkeypatch.setattr(bench_commands, "peaks", lambda: {"bf16": 1.0, "int8": 1.0, "copy": 1.0})
    monkeypatch.setattr(
        bench_kernels, "rows_of", lambda one, measured: rows_of(one, measured, "cpu")
    )
    monkeypatch.setattr(bench_kernels, "all_benches", lambda tokens: iter([good, last]))
    monkeypatch.setattr(bench_commands, "OUTPUT", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench_commands.kernels(bench_commands.make_parser().parse_args(["kernels"]))
    (table,) = tmp_path.glob("kernels-*.csv")
    lines = table.read_text().splitlines()
    assert lines[-1].startswith("last,M=8 N=32 K=64,torch bf16,")
    assert len(lines) > 3
    (plot,) = tmp_path.glob("kernels-*.svg")
    assert "torch bf16" in plot.read_text()


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_timing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert bench_timing.machine()[2] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_timing.machine()[2] == "unknown"


KERNELS, MEMORY = "tests/gpu/test_kernels.py", "tests/gpu/test_memory.py"


@pytest.mark.parametrize(
    ("command", "red", "code", "said", "ran"),
    [
        ("kernels", KERNELS, 1, f"{KERNELS} failed: a kernel disagrees", [KERNELS]),
        ("block", KERNELS, 4, f"{KERNELS} could not run (pytest ended with 4)", [KERNELS]),
        ("stream", KERNELS, 1, f"{KERNELS} failed: a kernel disagrees", [KERNELS]),
        ("stream", MEMORY, 1, f"{MEMORY} failed: a run takes more memory", [KERNELS, MEMORY]),
    ],
)
def test_no_speed_is_reported_where_the_gate_is_red(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    red: str,
    code: int,
    said: str,
    ran: list[str],
) -> None:
    """The message names the failed file of tests: a failed memory test is not a kernel's fault."""
    started: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        started.append(command[-1])
        return subprocess.CompletedProcess(command, code if command[-1] == red else 0)

    monkeypatch.setattr(bench_commands, "require_cuda", lambda command: True)
    monkeypatch.setattr(subprocess, "run", run)
    for name in ("kernels", "block", "streamed"):
        monkeypatch.setattr(
            bench_commands, name, lambda options: pytest.fail("measured behind a red gate")
        )
    assert bench_commands.main([command]) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert ("kernel disagrees" in errors) == (red == KERNELS and code == 1)
    assert started == ran


@pytest.mark.parametrize("command", ["kernels", "block", "stream"])
def test_green_gates_let_a_command_measure(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(bench_commands, "require_cuda", lambda command: True)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0),
    )
    monkeypatch.setenv("LOWVRAM_BACKEND", "")
    for name in ("kernels", "block", "streamed"):
        monkeypatch.setattr(bench_commands, name, lambda options: 7)
    assert bench_commands.main([command]) == 7


def test_the_gates_are_files_that_exist() -> None:
    assert {file for files in bench_commands.GATES.values() for file in files} == {KERNELS, MEMORY}
    assert all((SCRIPTS.parent / file).is_file() for file in (KERNELS, MEMORY))


def without(modules: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process in which these modules cannot be imported."""
    start = f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=SCRIPTS.parent
    )


BARE = (
    "av",
    "ftfy",
    "diffusers",
    "optimum",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "psutil",
    "typer",
    "rich",
    "msgspec",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["kernels", "block", "stream"])
def test_on_a_bare_machine_a_command_comes_as_far_as_looking_for_a_gpu(command: str) -> None:
    done = without(BARE, f"from scripts.bench.__main__ import main\nsys.exit(main([{command!r}]))")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f"bench {command}: no CUDA device here")
    assert "Traceback" not in done.stderr


def test_on_a_bare_machine_help_is_shown() -> None:
    done = without(BARE, "from scripts.bench.__main__ import main\nmain(['--help'])")
    assert done.returncode == 0, done.stderr
    assert "python -m scripts.bench all --seconds 540" in done.stdout


def test_on_a_bare_machine_kernels_are_measured_and_their_tests_are_found() -> None:
    code = f"""
import pytest
from scripts.bench import commands, kernels
assert commands.installed("kernels")
rows = list(kernels.rows_of(kernels.linear_bench("q", 8, 32, 64, "cpu"), {{}}, "cpu"))
assert {{"lowvram int8", "torch bf16"}} <= {{row.provider for row in rows}}, rows
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", {KERNELS!r}]))
"""
    done = without(BARE, code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "lacks", "said"),
    [
        ("block", ("diffusers",), "diffusers"),
        ("stream", ("av", "ftfy"), "av, ftfy"),
        ("kernels", ("triton",), "triton"),
    ],
)
def test_a_package_that_a_command_lacks_is_named_in_one_line(
    command: str, lacks: tuple[str, ...], said: str
) -> None:
    done = without(
        lacks,
        f"from scripts.bench import commands as it\nit.require_cuda = lambda command: "
        f"True\nsys.exit(it.main([{command!r}]))",
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"bench {command}: not installed here: {said}; ")


def test_a_block_needs_little_else() -> None:
    code = "from scripts.bench import block, commands\nassert commands.installed('block')"
    done = without(("av", "ftfy", "psutil", "typer", "rich"), code)
    assert done.returncode == 0, done.stderr


def test_green_gate_measures_with_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not support a call must fail the benchmark.

    Otherwise the torch reference would be measured under the kernel's name.
    """
    monkeypatch.setattr(bench_commands, "require_cuda", lambda command: True)
    monkeypatch.setattr(bench_commands, "gate", lambda files: True)
    monkeypatch.setattr(
        bench_commands,
        "kernels",
        lambda options: 0 if os.environ["LOWVRAM_BACKEND"] == "triton" else 1,
    )
    monkeypatch.setenv("LOWVRAM_BACKEND", "reference")
    assert bench_commands.main(["kernels"]) == 0


def test_a_block_is_measured_with_every_product_of_attention() -> None:
    found = [
        result.provider
        for result in bench_block.results(
            tiny_config(), (1, 4, 8), ("int8",), "cpu", ("int8", "fp16", "fp8")
        )
    ]
    assert found == [
        "diffusers bf16",
        "lowvram int8",
        "lowvram int8, PV fp16",
        "lowvram int8, PV fp8",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("main", "arguments"),
    [(bench_commands.main, ["kernels"]), (bench_commands.main, ["block"]), (tune.main, [])],
)
def test_without_a_gpu_nothing_is_measured_and_that_is_said(
    main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1  # type: ignore[operator]
    said = capsys.readouterr().out.strip()
    assert "no CUDA device here, nothing was measured" in said
    assert "\n" not in said


SLOW, FAST, WRONG = (
    LinearTile(64, 64, 64, 4, 2),
    LinearTile(128, 64, 64, 4, 2),
    LinearTile(64, 128, 64, 4, 2),
)


def present_tile() -> LinearTile:
    """Return the tile of a task's wrapper; the search replaces this function."""
    return SLOW


def toy_task(
    monkeypatch: pytest.MonkeyPatch,
    broken: tuple[LinearTile, ...] = (),
    dead: tuple[LinearTile, ...] = (),
) -> tune.Task:
    """Return a task on the CPU that the search treats as a GPU task.

    `broken` tiles raise; `dead` ones also make the device unusable.
    """
    out = torch.zeros(4)
    ran: list[LinearTile] = []

    def run() -> None:
        tile = present_tile()
        ran.append(tile)
        if tile in broken + dead:
            raise RuntimeError("refused")
        out.fill_(2.0 if tile == WRONG else 1.0)

    def synchronize() -> None:
        if ran and ran[-1] in dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    times = {SLOW: 2.0, FAST: 1.0}
    monkeypatch.setattr(tune, "measure", lambda run, repeats, device: (0.0, times[ran[-1]], 0.0))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return tune.Task("toy", f"{__name__}.present_tile", run, out.zero_, out, 0.0)


def test_tiles_are_printed_as_they_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = LinearTile(256, 64, 64, 4, 2)
    task = toy_task(monkeypatch, (broken,))
    monkeypatch.setattr(tune, "jobs", lambda *_: [(lambda: task, [SLOW, broken, WRONG, FAST])])
    assert tune.tune(8, "cuda", "", False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"toy: best of 1 of 4: 2.000 ms  {SLOW}"
    assert lines[1].endswith("refused")
    assert "another result" in lines[2]
    assert lines[3] == f"toy: best of 4 of 4: 1.000 ms  {FAST}"
    assert lines[4:6] == [f"toy: 1.000 ms  {FAST}", f"toy: 2.000 ms  {SLOW}"]
    assert "4 of 4 candidates" in lines[6]


def test_a_device_that_a_tile_breaks_ends_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = toy_task(monkeypatch, dead=(WRONG,))
    monkeypatch.setattr(tune, "require_cuda", lambda command: True)
    monkeypatch.setattr(tune, "jobs", lambda *_: [(lambda: task, [SLOW, WRONG, FAST])])
    assert tune.main([]) == 1
    said = capsys.readouterr()
    assert (
        f"toy {WRONG} broke the device (CUDA error: an illegal memory access was encountered)"
        in said.err
    )
    assert str(FAST) not in said.out


@pytest.mark.parametrize("broken", [(FAST, WRONG), (SLOW, FAST, WRONG)])
def test_a_search_that_finds_no_tile_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: tuple[LinearTile, ...],
) -> None:
    """Either the candidates do not run, or not even the present tile."""
    task = toy_task(monkeypatch, broken)
    monkeypatch.setattr(tune, "jobs", lambda *_: [(lambda: task, [FAST, WRONG])])
    assert tune.tune(8, "cuda", "", False) == 1
    assert "no tile was found for toy" in capsys.readouterr().err


def test_only_some_tasks_and_few_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    every, quick = tune.jobs(4, "cpu"), tune.jobs(4, "cpu", quick=True)
    assert len(every) == len(quick) == 2 * len(bench_kernels.LINEARS) + 4
    for (_, all_of_them), (_, few) in zip(every, quick, strict=True):
        assert set(few) < set(all_of_them)
        assert 4 <= len(few) <= 12
    assert len(tune.jobs(4, "cpu", "attention")) == 4
    assert [len(candidates) for _, candidates in tune.jobs(4, "cpu", "attention fp8", True)] == [4]
    assert tune.tune(4, "cpu", "no such task", False) == 1
    assert "no task's name contains 'no such task'" in capsys.readouterr().err
