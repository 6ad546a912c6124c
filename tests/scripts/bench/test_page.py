"""The last page of `bench all`: every goal is met, missed or not measured, and names the row
that decides it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from scripts.bench import page as bench_page
from scripts.bench.page import MET, MISSED, UNKNOWN, Verdict
from scripts.bench.stream_rows import StreamRow

FACTS = {
    "gpu": "G",
    "torch": "T",
    "triton": "R",
    "commit": "C",
    "source": "S",
    "identity": "I",
    "event": "row",
    "call": "1",
}


def row(step: str, unit: str = "u", **values: Any) -> dict[str, Any]:
    return {"step": step, "unit": unit, **FACTS, **values}


def timed(
    op: str, shape: str, provider: str, ms: float, unit: str = "TOPS", share: float = 0.5
) -> dict[str, Any]:
    return row(
        "speed",
        op=op,
        shape=shape,
        provider=provider,
        median_ms=ms,
        rate=100.0,
        unit=unit,
        share=share,
    )


def verdict(goal: str, rows: list[dict[str, Any]]) -> Verdict:
    (found,) = [one for one in bench_page.verdicts(rows) if goal in one.goal]
    return found


LINEAR, ATTENTION = "M=32760 N=5120 K=5120", "32760 queries, 32760 keys, 40 heads"


def test_nothing_measured_meets_no_goal() -> None:
    assert {one.result for one in bench_page.verdicts([])} == {UNKNOWN}


@pytest.mark.parametrize(("ms", "result"), [(1.0, MET), (1.1, MISSED)])
def test_linears_are_judged_by_the_worst_of_them(ms: float, result: str) -> None:
    rows = [
        timed("linear q", LINEAR, "lowvram int8", 1.0),
        timed("linear q", LINEAR, "torch bf16", 2.0),
    ]
    rows += [
        timed("linear o +=", LINEAR, "lowvram int8", ms),
        timed("linear o +=", LINEAR, "torch bf16", 1.6),
    ]
    rows += [timed("linear q", LINEAR, "torch._int_mm + rescale", 1.5)]
    found = verdict("32,760 tokens take", rows)
    assert (found.result, "linear o +=" in found.number, "the worst of 2" in found.number) == (
        result,
        True,
        True,
    )
    assert verdict("32,760 tokens are ahead", rows).result == MET
    assert verdict("75,600 tokens take", rows).result == UNKNOWN
    beaten = [*rows, timed("linear q", LINEAR, "comfy-kitchen 0.2 int8 (quantizes x too)", 0.9)]
    assert verdict("32,760 tokens are ahead", beaten).result == MISSED


def test_attention_is_judged_by_the_fastest_sdpa() -> None:
    rows = [
        timed("attention", ATTENTION, "lowvram int8, PV int8", 10.0),
        timed("attention", ATTENTION, "SDPA flash", 20.0),
    ]
    assert verdict("over 32,760 keys takes", rows).result == MET
    faster = [
        *rows,
        timed("attention", ATTENTION, "SDPA cudnn", 12.0),
        timed("attention", ATTENTION, "sageattention 1.0.6", 11.0),
    ]
    found = verdict("over 32,760 keys takes", faster)
    assert (found.result, "SDPA cudnn 12.000 ms" in found.number) == (MISSED, True)
    assert verdict("SageAttention", faster).result == MET


def test_the_speed_of_a_wrong_kernel_meets_no_goal() -> None:
    rows = [
        timed("attention", ATTENTION, "lowvram int8, PV int8", 1.0),
        timed("attention", ATTENTION, "SDPA flash", 20.0),
    ]
    rows += [
        row("correct", op="attention_int8", name="int8", problem="out: relative error 3.0e-02")
    ]
    found = verdict("over 32,760 keys takes", rows)
    assert (found.result, found.number.startswith("the kernel is wrong (out: relative error")) == (
        MISSED,
        True,
    )
    assert verdict("every kernel agrees", rows).result == MISSED


def test_kernels_and_tests_are_counted() -> None:
    rows = [row("correct", "check a", op=op, name="int8", problem="") for op in ("a", "b")]
    assert verdict("every kernel agrees", rows).number == "2 of 2 in 2 calls"
    parts = [
        row("correct", f"tests {n}/2", name="t", passed=3, failed=n, failures=["test_x: no"] * n)
        for n in (0, 1)
    ]
    found = verdict("tests on a GPU", parts)
    assert (found.result, found.number) == (MISSED, "6 passed, 1 failed in 2 parts; test_x: no")


def test_elementwise_kernels_a_block_and_tiles() -> None:
    rows = [
        timed("quantize_rows", "M=32760 K=5120", "lowvram int8", 1.0, "GB/s", share)
        for share in (0.9,)
    ]
    assert verdict("element-wise", rows).result == MET
    rows += [timed("gelu_quantize", "M=32760 K=5120", "lowvram int8", 1.0, "GB/s", 0.7)]
    assert "70%, the worst of 2: gelu_quantize" in verdict("element-wise", rows).number
    block = [
        row("block", provider=name, median_ms=ms)
        for name, ms in (("diffusers bf16", 32.0), ("lowvram int8", 20.0))
    ]
    assert (verdict("a block", block).result, verdict("a block", block).number[:5]) == (
        MET,
        "1.60x",
    )
    tiles = [
        row("tiles", name="linear q", tile=[n], median_ms=1.0, gain=gain, present=not gain)
        for n, gain in ((1, 0.0), (2, 0.05))
    ]
    assert (
        verdict("other tile", tiles).result,
        "+5.0%: linear q (2,)" in verdict("other tile", tiles).number,
    ) == (MISSED, True)


def streamed(vram: float, **values: Any) -> dict[str, Any]:
    base = StreamRow(
        "lowvram int8",
        "832x480",
        81,
        32760,
        8,
        4,
        vram,
        20.0,
        resident=8 if vram > 20 else 1,
        step_s=1.0,
        overhead=0.0,
    )
    return row("stream", **{**asdict(base), **values})


def test_budgets_change_no_bit_and_exceed_no_plan() -> None:
    one = streamed(60.0, latents_sha256="a" * 64, peak_vram_gb=10.0, planned_vram_gb=11.0)
    other = streamed(
        6.0, latents_sha256="a" * 64, peak_vram_gb=5.0, planned_vram_gb=5.5, overhead=0.01
    )
    assert verdict("no bit of the latents", [one, other]).result == MET
    assert verdict("no peak", [one, other]).result == MET
    assert verdict("at most 2% longer", [one, other]).result == MET
    changed = [
        one,
        streamed(6.0, latents_sha256="b" * 64, peak_vram_gb=6.0, planned_vram_gb=5.5, overhead=0.1),
    ]
    assert verdict("no bit of the latents", changed).result == MISSED
    assert verdict("no peak", changed).result == MISSED
    assert verdict("at most 2% longer", changed).result == MISSED


def test_the_demo_must_show_its_prompt() -> None:
    clips = [
        row("demo", name=name, frames_sha256="a", shows_its_prompt=True)
        for name in ("resident", "from disk")
    ]
    assert verdict("demo's frames", clips).result == MET
    clips[1]["shows_its_prompt"] = False
    assert verdict("demo's frames", clips).result == MISSED


def test_rows_of_another_machine_and_replaced_rows_do_not_count() -> None:
    old = timed("linear q", LINEAR, "lowvram int8", 5.0) | {"identity": "another"}
    first, second = (timed("linear q", LINEAR, "lowvram int8", ms) for ms in (3.0, 2.0))
    assert [one["median_ms"] for one in bench_page.rows_that_count([old, first, second])] == [2.0]
