"""The same seed gives the same frames whatever the memory plan, and after any interruption
(promises 17 and 20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram import pipeline as pipeline_module
from lowvram.errors import NumericsError, ResumeError
from lowvram.models.numerics import arithmetic
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import PlanChoice
from lowvram.progress import Progress
from lowvram.sampling.state import load_state
from lowvram.store.reader import Store
from tests.helpers.runs import CPU, digest, expert_velocities, pipeline_of, plan_of, request_of
from tests.helpers.staged import PROCESS_BYTES, StagedPipeline

StoreOf = Callable[[str], Store]
# 140 tokens: ragged in chunks, in key tiles and in vectors
CLIP: dict[str, Any] = {"width": 112, "height": 80, "num_frames": 13}
PLANS = {
    "smallest: one slot, everything from disk": PlanChoice(64, 1, 0, 0, False),
    "two slots": PlanChoice(64, 2, 0, 0, False),
    "one resident, one ring slot, larger chunk": PlanChoice(128, 1, 1, 0, False),
    "blocks cached in RAM": PlanChoice(128, 1, 0, 2, False),
    "branches share visits": PlanChoice(64, 2, 0, 1, True),
    "everything resident": PlanChoice(192, 0, 2, 0, True),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "format", ["int8", pytest.param("int8-plain", marks=SLOW), pytest.param("fp8", marks=SLOW)]
)
def test_p17_no_plan_changes_a_bit(tiny_store: StoreOf, format: str) -> None:
    """The last step of three is refined where the format can be."""
    pipeline = pipeline_of(tiny_store(format))
    refined = int(format != "fp8")
    request = request_of(pipeline, steps=3, shift=8.0, refine_steps=refined, **CLIP)
    digests = {
        name: digest(pipeline.generate(request, plan=plan_of(pipeline, request, choice)).frames)
        for name, choice in PLANS.items()
    }
    assert len(set(digests.values())) == 1, digests
    other = pipeline.generate(request_of(pipeline, steps=3, shift=8.0, seed=1, **CLIP))
    assert digest(other.frames) not in digests.values(), "another seed must give another video"
    if refined:
        usual = pipeline.generate(request_of(pipeline, steps=3, shift=8.0, **CLIP))
        assert digest(usual.frames) not in digests.values(), "refined steps must do something"


# plan, and how many blocks pass from pageable RAM to staging in three steps of two branches of two
# blocks
TIERS = {
    "disk only": (PlanChoice(64, 2, 0, 0, False), 0),
    "pageable RAM": (PlanChoice(64, 1, 0, 2, False), 12),
    "pinned RAM": (PlanChoice(64, 1, 0, 2, False, pinned_blocks=2), 0),
    "one block pinned, one pageable, one slot": (
        PlanChoice(128, 1, 0, 2, False, pinned_blocks=1),
        6,
    ),
    "one block resident, one pinned": (PlanChoice(64, 1, 1, 1, False, pinned_blocks=1), 0),
    "one block resident, one pageable, shared visits": (PlanChoice(64, 1, 1, 1, True), 2),
}


@pytest.mark.slow
def test_p17_no_tier_changes_a_bit(tiny_store: StoreOf) -> None:
    """The path of a GPU (staging, pinned and pageable RAM, three workers) gives the bits of reads
    straight into the slots.
    """
    store = tiny_store("int8")
    direct = pipeline_of(store)
    request = request_of(direct, steps=3, shift=8.0)
    expected = digest(
        direct.generate(request, plan=plan_of(direct, request, PLANS["two slots"])).frames
    )
    for name, (choice, staged) in TIERS.items():
        pipeline = StagedPipeline(store)
        plan = plan_of(pipeline, request, choice)
        video = pipeline.generate(request, plan=plan)
        assert digest(video.frames) == expected, name
        assert pipeline.transport.staged_blocks == staged, name
        assert pipeline.transport.pinned_copies > 0, name
        assert pipeline.transport.pageable_copies == 0, name
        assert not pipeline.transport.locked, "pages are unlocked at the end"
        buffers = choice.host_blocks + plan.staging_buffers
        assert video.peak_bytes["ram"] == PROCESS_BYTES + max(
            buffers * plan.slot_bytes, plan.staging_buffers * plan.text_slot_bytes
        ), name
        assert video.peak_bytes["ram"] <= plan.peak_ram_bytes, name


@pytest.mark.slow
@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_unquantized_plans_agree_within_rounding(tiny_store: StoreOf, format: str) -> None:
    pipeline = pipeline_of(tiny_store(format))
    request = request_of(pipeline, steps=2, **CLIP)
    frames = [
        pipeline.generate(request, plan=plan_of(pipeline, request, choice)).frames.float()
        for choice in PLANS.values()
    ]
    assert max(float((clip - frames[0]).abs().mean()) for clip in frames) < 0.5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_chunks_change_no_bit_of_a_velocity(tiny_store: StoreOf, threads: int) -> None:
    store, before = tiny_store("int8"), torch.get_num_threads()
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(16, 4, 10, 14, generator=generator)
    features = [torch.randn(9, store.config.dit.text_dim, generator=generator)]
    torch.set_num_threads(1)
    expected = expert_velocities(
        store, "low_noise", (112, 80), 13, latents, 500, features, PlanChoice(192, 0, 2, 0, False)
    )
    try:
        torch.set_num_threads(threads)
        for chunk in (64, 128, 192):
            actual = expert_velocities(
                store,
                "low_noise",
                (112, 80),
                13,
                latents,
                500,
                features,
                PlanChoice(chunk, 1, 0, 0, False),
            )
            assert digest(actual[0]) == digest(expected[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_p17_counted_peak_stays_under_the_plan(tiny_store: StoreOf) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    request = request_of(pipeline, steps=2, **CLIP)
    for choice in PLANS.values():
        plan = plan_of(pipeline, request, choice)
        peak = pipeline.generate(request, plan=plan).peak_bytes
        assert 0 < peak["vram"] <= plan.peak_vram_bytes
        assert pipeline.host.process_bytes <= peak["ram"] <= plan.peak_ram_bytes
        # The ledger's peak is the arena and the slots: exactly what the plan lists for them.
        slots = (choice.resident_blocks + choice.ring_slots) * plan.slot_bytes
        assert peak["vram"] == max(plan.workspace.nbytes + slots, 2 * plan.text_slot_bytes)


class Interrupted(Exception):
    """Stands for a kill between two steps."""


def interrupt_after(step: int) -> Callable[[Progress], None]:
    def listen(event: Progress) -> None:
        if event.phase == "denoise" and event.done == step:
            raise Interrupted

    return listen


@pytest.mark.parametrize("solver", ["unipc", pytest.param("euler", marks=SLOW)])
def test_p20_resumed_at_any_step_ends_in_the_same_bits(
    tiny_store: StoreOf, tmp_path: Path, solver: str
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    request = request_of(pipeline, steps=4, shift=8.0, solver=solver, refine_steps=2)
    expected = digest(pipeline.generate(request).frames)
    for step in range(1, 5):
        state = tmp_path / f"{solver}{step}.resume"
        with pytest.raises(Interrupted):
            pipeline.generate(request, state_file=state, listener=interrupt_after(step))
        shape = pipeline.workload(request).latents.shape
        saved = load_state(state, request, pipeline.model, arithmetic("int8", CPU), shape)
        assert saved.step == step
        assert digest(pipeline.generate(request, state_file=state, resume=True).frames) == expected


def test_resume_refuses_another_request_and_names_both_values(
    tiny_store: StoreOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    state = tmp_path / "clip.resume"
    with pytest.raises(Interrupted):
        pipeline.generate(request_of(pipeline), state_file=state, listener=interrupt_after(1))
    with pytest.raises(ResumeError, match=r"seed was 0, now 7"):
        pipeline.generate(request_of(pipeline, seed=7), state_file=state, resume=True)
    with monkeypatch.context() as patched:
        patched.setenv("LOWVRAM_PV", "fp16")
        with pytest.raises(
            ResumeError, match=r"arithmetic was 'values int8, .*', now 'values float16, "
        ):
            pipeline.generate(request_of(pipeline), state_file=state, resume=True)
    with monkeypatch.context() as patched:
        patched.setenv("LOWVRAM_ACTIVATIONS", "bf16")
        with pytest.raises(ResumeError, match=r"activations float16', now .* activations bfloat16"):
            pipeline.generate(request_of(pipeline), state_file=state, resume=True)
    with pytest.raises(ResumeError, match="nothing to resume"):
        pipeline.generate(request_of(pipeline), state_file=tmp_path / "none.resume", resume=True)
    state.write_bytes(b"garbage")
    with pytest.raises(ResumeError, match="not the state of an interrupted run"):
        pipeline.generate(request_of(pipeline), state_file=state, resume=True)


def test_p20_nan_names_step_expert_and_block(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowvram.models import wan

    pipeline = pipeline_of(tiny_store("int8"))
    run_block = wan.WanTransformer._run_block
    visits = iter(range(1000))

    def poisoned(self: wan.WanTransformer, block: object, x: torch.Tensor, *rest: object) -> None:
        run_block(self, block, x, *rest)  # type: ignore[arg-type]
        # step 2 of a 2-block model with two branches: second block of the positive branch
        if next(visits) == 6:
            x.fill_(float("nan"))

    monkeypatch.setattr(wan.WanTransformer, "_run_block", poisoned)
    request = request_of(pipeline)
    plan = plan_of(pipeline, request, PlanChoice(64, 2, 0, 0, True))
    with pytest.raises(NumericsError, match=r"step 2 of 3 .*expert high_noise, block 1"):
        Pipeline.generate(pipeline, request, plan=plan)


def test_p17_a_run_is_capped_at_its_budget(
    tiny_store: StoreOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first phase to the last; less what the driver has taken, which torch's allocator
    does not see.
    """
    events: list[object] = []

    @contextmanager
    def cap(device: torch.device, nbytes: int) -> Iterator[None]:
        events.append(nbytes)
        yield
        events.append("end")

    monkeypatch.setattr(pipeline_module, "vram_cap", cap)
    pipeline = pipeline_of(tiny_store("int8"))
    pipeline.host = replace(pipeline.host, context_bytes=1000)
    pipeline.generate(
        request_of(pipeline, steps=1), listener=lambda event: events.append(event.phase)
    )
    assert (events[0], events[-1]) == (pipeline.vram_bytes - 1000, "end")
    assert {"text", "decode"} < set(events[1:-1])
