"""Memory that other programs take: every allocation, block and phase fails once, and the video
stays the same (promise 16).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch

from lowvram.errors import OutOfMemoryError
from lowvram.hardware.cgroups import HostMemory
from lowvram.memory.out_of_memory import is_out_of_memory, short_budget
from lowvram.models import wan
from lowvram.pipeline import Pipeline, Video
from lowvram.planner.choose import choose_plan
from lowvram.planner.fallback import RAM, VRAM, FallbackPlans
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import MemoryPlan, describe_plan
from lowvram.progress import Progress
from lowvram.request import Request, Workload
from lowvram.sampling import recovery
from lowvram.store.reader import Store
from lowvram.variants import T2V_A14B
from tests.faults.inject import Allocator, Injection, at, cpu_error, cuda_error, first, python_error
from tests.helpers.runs import digest, pipeline_of, plan_of, request_of
from tests.helpers.staged import StagedPipeline, StagedTransport
from tests.helpers.threads import lowvram_threads

StoreOf = Callable[[str], Store]
CHOICE = PlanChoice(128, 1, 1, 1, True, pinned_blocks=1)
GIB = 2**30


@pytest.fixture
def pipeline(tiny_store: StoreOf) -> StagedPipeline:
    return StagedPipeline(tiny_store("int8"))


@pytest.fixture(scope="module")
def expected(tiny_store: StoreOf) -> str:
    pipeline = pipeline_of(tiny_store("int8"))
    return digest(pipeline.generate(request(pipeline)).frames)


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> StoreOf:
    from tests.helpers.checkpoints import tiny_config
    from tests.helpers.runs import make_store

    store = make_store(tmp_path_factory.mktemp("fallbacks"), tiny_config(), "int8")
    return lambda format: store


def request(pipeline: Pipeline) -> Request:
    return request_of(pipeline, steps=3, shift=8.0)


def run(
    pipeline: StagedPipeline,
    choice: PlanChoice = CHOICE,
    listener: Callable[[Progress], None] = lambda event: None,
) -> tuple[Video, MemoryPlan]:
    plan = plan_of(pipeline, request(pipeline), choice)
    video = pipeline.generate(request(pipeline), plan=plan, listener=listener)
    assert video.peak_bytes["vram"] <= plan.peak_vram_bytes
    assert video.peak_bytes["ram"] <= plan.peak_ram_bytes
    assert not lowvram_threads()
    return video, plan


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "out of" in record.getMessage()]


ERRORS = (cuda_error, cpu_error, python_error)


def is_call(wanted: int, number: int, nbytes: int) -> bool:
    return number == wanted


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_p16_what_libraries_say_when_the_device_is_full(message: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is is_memory
    assert not is_out_of_memory(ValueError(message)), "only errors of torch's own kind"
    assert short_budget(RuntimeError(message)) == VRAM


@pytest.mark.slow
def test_p16_any_allocation_may_fail_once(
    pipeline: StagedPipeline,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        memory = Allocator(patch)
        _, plan = run(pipeline)
        total = memory.count
    # slots and staging of text and blocks, one cached block, the arena
    assert total == 2 + 2 + 2 + 2 + 1 + 1
    for number in range(total):
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            memory = Allocator(patch, ERRORS[number % 3], partial(is_call, number))
            video, _ = run(pipeline)
        assert digest(video.frames) == expected, number
        assert len(fallbacks(caplog)) == 1, number
        assert (
            memory.peak_bytes
            <= plan.peak_vram_bytes + plan.peak_ram_bytes - pipeline.host.process_bytes
        )
        assert memory.live_bytes == 0, "everything is handed back"


@pytest.mark.slow
def test_p16_any_block_of_any_step_may_fail(
    pipeline: StagedPipeline,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Finished steps are not computed again: each failure costs the blocks of its own step at
    most.
    """
    visits = 3 * 2 * 2
    for failing in range(visits):
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            blocks = Injection(patch, wan.WanTransformer, "_run_block", cuda_error, at(failing))
            video, _ = run(pipeline)
        assert digest(video.frames) == expected, failing
        assert blocks.calls == visits + 1 + failing % 4
        step = failing // 4
        assert f"step {step + 1} of 3" in fallbacks(caplog)[0]
        assert f"continuing from step {step} with" in fallbacks(caplog)[0]


@pytest.mark.parametrize("phase", ["_encode_prompts", "_condition", "_decode"])
def test_p16_the_other_phases_are_tried_once_more(
    pipeline: StagedPipeline,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    phase: str,
) -> None:
    with monkeypatch.context() as patch:
        calls = Injection(patch, Pipeline, phase, cuda_error, first(1))
        assert digest(run(pipeline)[0].frames) == expected
    assert "trying it once more" in caplog.text
    assert calls.calls == 2
    calls = Injection(monkeypatch, Pipeline, phase, cuda_error)
    with pytest.raises(
        OutOfMemoryError, match=r"out of VRAM in the \w+ phase \(CUDA out of memory"
    ):
        run(pipeline)
    assert calls.calls == (2 if phase == "_condition" else 3), (
        "where there is a leaner way, that too"
    )


def test_p16_the_last_fallback_plan_is_a_clear_error(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = Injection(monkeypatch, wan.WanTransformer, "_run_block", cuda_error)
    with pytest.raises(
        OutOfMemoryError, match=r"out of VRAM in step 1 of 3 .* needs .* of VRAM; close .* --size"
    ) as failed:
        run(pipeline, PlanChoice(192, 2, 0, 2, True))
    assert "\n" not in str(failed.value)
    said = fallbacks(caplog)
    assert blocks.calls == len(said) + 1 == 8
    assert "the same plan once more" in said[-1]
    for text in (
        "one slot",
        "one guidance branch after the other",
        "chunks of 128 tokens instead of 192",
        "chunks of 64 tokens",
    ):
        assert sum(text in line for line in said) == 1, said
    assert not lowvram_threads()


def test_other_errors_are_raised_as_they_are(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = Injection(
        monkeypatch,
        wan.WanTransformer,
        "_run_block",
        lambda: RuntimeError("CUDA error: an illegal memory access was encountered"),
    )
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(pipeline)
    assert blocks.calls == 1
    assert not fallbacks(caplog)


class RaisingTransport(StagedTransport):
    """A driver that says why it refuses."""

    def pin(self, buffer: torch.Tensor) -> bool:
        raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")


@pytest.mark.parametrize(
    ("transport", "locks"),
    [(StagedTransport, 0), (StagedTransport, 1), (StagedTransport, 3), (RaisingTransport, None)],
)
def test_p16_refused_pinning_leaves_pageable_buffers(
    tiny_store: StoreOf,
    expected: str,
    caplog: pytest.LogCaptureFixture,
    transport: type[StagedTransport],
    locks: int | None,
) -> None:
    """Staging is locked first; cached blocks that are not pass through it."""
    pipeline = StagedPipeline(tiny_store("int8"), transport, locks)
    video, _ = run(pipeline, PlanChoice(64, 1, 0, 2, False, pinned_blocks=2))
    assert digest(video.frames) == expected
    assert "could not page-lock" in caplog.text
    assert "their copies are slower" in caplog.text
    locked = locks or 0
    assert pipeline.transport.staged_blocks == (6 if locked == 3 else 12)
    assert (pipeline.transport.pageable_copies > 0) is (locked < 2)
    assert not pipeline.transport.locked


def test_p16_blocks_in_ram_are_handed_back_under_pressure(
    pipeline: StagedPipeline,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another program fills the RAM and takes ever more of it: half of the blocks go, then all;
    then nobody asks any more.
    """
    readings: list[int] = []

    def host() -> HostMemory:
        readings.append(2**20)
        return HostMemory(16 * GIB, 2**20, "machine")

    monkeypatch.setattr(recovery, "host_memory", host)
    monkeypatch.setattr(recovery, "FREE_RAM_PERIOD_S", 0.0)
    video, _ = run(pipeline, PlanChoice(64, 1, 0, 2, False, pinned_blocks=2))
    assert digest(video.frames) == expected
    assert len(readings) == 2
    first, second = (
        record.getMessage() for record in caplog.records if "of RAM is free" in record.getMessage()
    )
    assert "keeping 1 blocks in RAM instead of 2" in first
    assert "reading every block from the disk" in second


def test_a_run_with_fallback_plans_reports_each_step_once(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    Allocator(monkeypatch, cuda_error, lambda number, nbytes: number == 9)
    seen = []
    run(
        pipeline,
        listener=lambda event: seen.append(event.done) if event.phase == "denoise" else None,
    )
    assert seen == [0, 1, 2, 3]


def test_nothing_is_allocated_between_the_first_step_and_the_last(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, counts = Allocator(monkeypatch), []
    run(
        pipeline,
        PlanChoice(64, 1, 0, 1, False),
        lambda event: counts.append(memory.count) if event.phase == "denoise" else None,
    )
    before, *steps = counts
    assert len(steps) == 3
    # one slot, two staging buffers, one cached block, the arena
    assert set(steps) == {before + 1 + 2 + 1 + 1}


def a14b(
    vram_gib: float, ram_gib: float, device: str = "cuda"
) -> tuple[MemoryPlan, Callable[[PlanChoice], MemoryPlan]]:
    host = Host.of(device)
    plan = choose_plan(
        Workload.of(T2V_A14B, "int8", (1280, 720), 81, 40),
        host,
        int(vram_gib * GIB),
        int(ram_gib * GIB),
    )
    return plan, lambda choice: describe_plan(
        Workload.of(T2V_A14B, "int8", (1280, 720), 81, 40), choice, host
    )


def descend(fallbacks: FallbackPlans, short: str) -> list[MemoryPlan]:
    plans = [fallbacks.plan]
    while (fallback := fallbacks.down(short)) is not None:
        assert fallback.plan is fallbacks.plan
        assert fallback.gives_up
        plans.append(fallback.plan)
    return plans


@pytest.mark.parametrize("short", [VRAM, RAM])
@pytest.mark.parametrize("vram_gib", [6, 12, 24, 80])
@pytest.mark.parametrize("ram_gib", [6, 16, 64])
def test_every_fallback_plan_needs_less_and_there_are_a_handful(
    short: str, vram_gib: int, ram_gib: int
) -> None:
    plans = descend(FallbackPlans(*a14b(vram_gib, ram_gib)), short)
    label = "vram_bytes" if short == VRAM else "ram_bytes"
    other = "ram_bytes" if short == VRAM else "vram_bytes"

    def needs(plan: MemoryPlan, budget: str) -> int:
        (nbytes,) = (getattr(peak, budget) for peak in plan.phases if peak.phase == "denoise")
        return int(nbytes)

    amounts = [needs(plan, label) for plan in plans]
    assert amounts == sorted(amounts, reverse=True)
    assert len(set(amounts)) == len(plans) <= 7
    assert all(needs(plan, other) <= needs(plans[0], other) for plan in plans)
    foot = plans[-1].choice
    if short == VRAM:
        assert (foot.resident_blocks, foot.ring_slots, foot.joint_guidance, foot.chunk_tokens) == (
            0,
            1,
            False,
            64,
        )
    else:
        assert (foot.host_blocks, foot.pinned_blocks) == (0, 0)
        assert foot.chunk_tokens == plans[0].choice.chunk_tokens


def test_on_a_cpu_either_budget_is_helped_by_both() -> None:
    fallbacks = FallbackPlans(*a14b(12, 16, "cpu"), shared=True)
    choices = [plan.choice for plan in descend(fallbacks, VRAM)]
    assert choices[1].host_blocks < choices[0].host_blocks, (
        "RAM buffers go first: residency costs more to lose"
    )
    assert (choices[-1].host_blocks, choices[-1].resident_blocks, choices[-1].chunk_tokens) == (
        0,
        0,
        64,
    )
