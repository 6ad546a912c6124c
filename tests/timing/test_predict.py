"""Predictions: operations against the facts and against torch's own count, few simulated steps
against all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_kernels import ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowvram.formats import FORMATS
from lowvram.hardware.profile import MachineProfile
from lowvram.memory.arena import Arena, Ledger
from lowvram.models.vae import _build
from lowvram.models.wan import WanTransformer, condition, load_embeddings_and_head
from lowvram.planner.choose import choose_plan
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import MemoryPlan, describe_plan
from lowvram.request import Workload
from lowvram.sampling.schedule import make_schedule
from lowvram.sigmas import expert_of, high_noise_steps
from lowvram.store.reader import Store, open_store
from lowvram.streaming.stream import Buffers, open_stream
from lowvram.streaming.transport import make_transport
from lowvram.timing import forecast
from lowvram.timing.cards import find_card
from lowvram.timing.forecast import Forecast
from lowvram.timing.predict import (
    LAUNCHES_PER_CHUNK,
    LAUNCHES_PER_VISIT,
    attention_ops,
    block_seconds,
    decode_ops,
    decode_seconds,
    elementwise_bytes,
    linear_ops,
    text_codes,
    text_ops,
)
from lowvram.variants import EXPERTS, I2V_A14B, T2V_A14B, VAEConfig
from tests.helpers.checkpoints import tiny_config, write_store

CPU = torch.device("cpu")
DIT, HD = T2V_A14B.dit, (1280, 720)
CARD = find_card("RTX 4090").profile(16 * 2**30)


def profile(**changes: float) -> MachineProfile:
    return dataclasses.replace(CARD, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "tera"), [(75_600, 163.1), (32_760, 41.96)])
def test_a_block_is_the_work_that_the_facts_count(tokens: int, tera: float) -> None:
    """kernels 5."""
    ops = (
        linear_ops(DIT, tokens)
        + text_ops(DIT)
        + attention_ops(DIT, tokens, tokens)
        + attention_ops(DIT, tokens, DIT.text_len)
    )
    assert ops / 1e12 == pytest.approx(tera, rel=1e-3)


def test_element_wise_work_is_what_the_facts_count() -> None:
    """kernels 5: a fused block moves about 25.5 times its tokens in bf16, +- 15 %."""
    assert elementwise_bytes(DIT, FORMATS["int8"]) / (2 * DIT.dim) == pytest.approx(25.5, rel=0.15)


def test_seconds_of_a_block_follow_from_the_rates() -> None:
    tokens, rate = 8192 * 4, 1e12
    bare = profile(
        gemm_int8_ops_s=rate, attention_ops_s=rate, elementwise_bytes_s=1e30, launch_s=1e-12
    )
    ops = (
        linear_ops(DIT, tokens)
        + 2 * text_ops(DIT)  # the context of the text has two codes
        + attention_ops(DIT, tokens, tokens + DIT.text_len)
    )
    assert block_seconds(DIT, FORMATS["int8"], tokens, 8192, bare) == pytest.approx(ops / rate)
    moved = profile(
        gemm_int8_ops_s=1e30, attention_ops_s=1e30, elementwise_bytes_s=1e9, launch_s=1e-12
    )
    seconds = block_seconds(DIT, FORMATS["int8"], tokens, 8192, moved)
    assert seconds is not None
    assert seconds > tokens * elementwise_bytes(DIT, FORMATS["int8"]) / 1e9


def test_a_refined_step_has_two_products_per_linear_and_slower_attention() -> None:
    tokens, rate = 8192 * 4, 1e12
    bare = profile(
        gemm_int8_ops_s=rate,
        attention_ops_s=rate,
        attention_bf16_ops_s=rate / 2,
        elementwise_bytes_s=1e30,
        launch_s=1e-12,
    )
    ops = 2 * (
        linear_ops(DIT, tokens) + text_ops(DIT) + attention_ops(DIT, tokens, tokens + DIT.text_len)
    )
    refined_s = block_seconds(DIT, FORMATS["int8"], tokens, 8192, bare, refined=True)
    assert refined_s == pytest.approx(ops / rate)
    assert elementwise_bytes(DIT, FORMATS["int8"], 2) > elementwise_bytes(DIT, FORMATS["int8"])


@pytest.mark.parametrize("refine_steps", [2, 30, 40])
def test_refined_steps_take_their_own_time(refine_steps: int) -> None:
    """Of 40 steps; 30 reach into the high-noise expert."""
    workloads = [
        Workload.of(T2V_A14B, "int8", (832, 480), 81, refine_steps=count)
        for count in (0, refine_steps, 40)
    ]
    choice, host = PlanChoice(8192, 0, 40, 0, False), Host.of("cuda")
    usual, refined, all_refined = (
        Forecast(workload, CARD)(describe_plan(workload, choice, host)) for workload in workloads
    )
    assert usual is not None
    assert refined is not None
    assert all_refined is not None
    share = refine_steps / 40
    expected = (1 - share) * usual.compute_s + share * all_refined.compute_s
    assert refined.compute_s == pytest.approx(expected)
    assert refined.denoise_s >= refined.compute_s > usual.compute_s
    assert all_refined.compute_s < 2.5 * usual.compute_s


def test_short_chunks_cost_time_and_launches_bound_tiny_ones() -> None:
    seconds = [
        block_seconds(DIT, FORMATS["int8"], 32_760, chunk, CARD) for chunk in (8192, 2048, 512, 64)
    ]
    assert seconds == pytest.approx(sorted(seconds, key=lambda value: value or 0), rel=1e-12)
    slow = profile(launch_s=1e-3)
    launching_s = (2 * LAUNCHES_PER_CHUNK + LAUNCHES_PER_VISIT + 2) * 1e-3
    assert block_seconds(DIT, FORMATS["int8"], 128, 64, slow) == pytest.approx(launching_s)
    host = dataclasses.replace(slow, device="cpu")
    assert (block_seconds(DIT, FORMATS["int8"], 128, 64, host) or 0) > launching_s


class Launches(TorchDispatchMode):
    """Counts what starts a kernel on a GPU: every op of the dispatch once, whatever its reference
    does, and every operator of torch outside of them that is no view and does more than allocate.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.count = self.within = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        returns = func._schema.returns
        view = bool(returns) and all(
            value.alias_info is not None and not value.alias_info.is_write for value in returns
        )
        if not self.within and not view and "empty" not in func._schema.name:
            self.count += 1
        return func(*args, **(kwargs or {}))

    def counted(self, op: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            self.count += not self.within
            self.within += 1
            try:
                op(*args, **kwargs)
            finally:
                self.within -= 1

        return run


@torch.no_grad()
def launches_of_a_visit(store: Store, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels from behind the first block to behind the second: one visit, of a clip of 768 tokens
    and one branch.
    """
    config, choice = store.config, PlanChoice(chunk_tokens, 0, 2, 0, False)
    plan = describe_plan(
        Workload.of(config, store.format, (256, 256), 9, 1), choice, Host.of("cpu")
    )
    assert plan.workload.num_tokens == 768
    ledger, file = Ledger("VRAM", plan.peak_vram_bytes), store.files[EXPERTS[0]]
    conditioning = condition(
        file.read,
        config.dit,
        store.format,
        torch.tensor([900]),
        [torch.randn(7, config.dit.text_dim)],
        CPU,
    )
    schedule, buffers = (
        [(EXPERTS[0], index) for index in range(2)],
        Buffers(plan.slot_bytes, 2, 0, 0, 0),
    )
    counter, counts = Launches(), list[int]()
    with (
        monkeypatch.context() as patch,
        open_stream(
            store.files,
            schedule,
            buffers,
            ledger,
            Ledger("RAM", plan.peak_ram_bytes),
            CPU,
            make_transport(CPU),
        ) as streamer,
        counter,
    ):
        for name in ops.OPS:
            patch.setattr(ops, name, counter.counted(getattr(ops, name)))
        model = WanTransformer(plan.workload, choice, Arena(plan.workspace, ledger, CPU), CPU)
        ends = load_embeddings_and_head(file.read, store.format, CPU)
        latents = torch.randn(plan.workload.latents.shape)
        model.velocities(
            latents,
            0,
            conditioning,
            ends,
            streamer,
            EXPERTS[0],
            lambda index, x: counts.append(counter.count),
        )
    return counts[1] - counts[0]


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_block_starts_the_kernels_that_are_counted(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(write_store(tmp_path / "model", tiny_config(), format)) as store:
        one, three, six = (
            launches_of_a_visit(store, chunk, monkeypatch) for chunk in (768, 256, 128)
        )
    per_chunk = (six - three) / 3
    assert three - one == 2 * per_chunk
    assert (per_chunk, one - per_chunk) == (
        LAUNCHES_PER_CHUNK,
        LAUNCHES_PER_VISIT + text_codes(FORMATS[format]),
    )


def test_formats_have_their_own_rates() -> None:
    ampere = find_card("RTX 3090").profile()
    assert ampere.gemm_ops_s("fp8") == ampere.gemm_bf16_ops_s  # decoded
    assert CARD.gemm_ops_s("fp8") == CARD.gemm_fp8_ops_s
    assert CARD.gemm_ops_s("int8") == CARD.gemm_ops_s("int8-plain") == CARD.gemm_int8_ops_s
    assert block_seconds(DIT, FORMATS["fp32"], 64, 64, CARD) is None


def test_the_decoder_does_the_operations_that_torch_counts() -> None:
    """The first frame stands for a whole latent one, so short clips do a little more than their
    share.
    """
    config = VAEConfig(base_dim=8)
    model = _build(config).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        clip = model.decode(torch.randn(1, 16, 4, 4, 4), return_dict=False)[0]
    counted = sum(
        ops for op, ops in counter.get_flop_counts()["Global"].items() if "convolution" in str(op)
    )
    pixels = clip.shape[2] * clip.shape[3] * clip.shape[4]
    assert clip.shape[2:] == (13, 32, 32)
    assert counted / pixels == pytest.approx(decode_ops(config), rel=0.06)


def test_tiles_decode_their_overlaps_twice() -> None:
    workload = Workload.of(T2V_A14B, "int8", HD)
    whole, tiled = (decode_seconds(workload, tile, CARD) for tile in (0, 256))
    assert 1.3 < tiled / whole < 2.2


@pytest.mark.parametrize("steps", [1, 4, 30, 40, 50])
@pytest.mark.parametrize(
    ("shift", "boundary"), [(12.0, 0.875), (5.0, 0.9), (1.0, 0.5), (5.0, 0.0), (5.0, 1.0)]
)
def test_experts_work_the_steps_that_the_schedule_gives_them(
    steps: int, shift: float, boundary: float
) -> None:
    timesteps = make_schedule("unipc", steps, shift).timesteps.tolist()
    assert high_noise_steps(steps, shift, boundary) == sum(
        expert_of(timestep, boundary) == EXPERTS[0] for timestep in timesteps
    )


def plan_of(
    choice: PlanChoice, size: tuple[int, int] = (480, 272), frames: int = 17, device: str = "cuda"
) -> MemoryPlan:
    return describe_plan(Workload.of(T2V_A14B, "int8", size, frames, 40), choice, Host.of(device))


def clock(
    steps: int = 40, branches: tuple[int, int] = (2, 2), machine: MachineProfile = CARD
) -> Forecast:
    workload = Workload.of(T2V_A14B, "int8", steps=steps)
    return Forecast(dataclasses.replace(workload, branches=branches), machine)


CHOICES = [
    PlanChoice(2560, 2, 0, 0, False),
    PlanChoice(2560, 3, 12, 10, True, 5),
    PlanChoice(2560, 4, 5, 35, False, 20),
    PlanChoice(2560, 0, 40, 0, True),
    PlanChoice(2560, 1, 3, 0, False),
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("branches", [(2, 2), (1, 2), (1, 1)])
def test_a_few_simulated_steps_stand_for_all(
    choice: PlanChoice, branches: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = clock(20, branches)(plan_of(choice))
    monkeypatch.setattr(forecast, "SIMULATED_STEPS", 20)
    every = clock(20, branches)(plan_of(choice))
    assert few is not None
    assert every is not None
    assert few.denoise_s == pytest.approx(every.denoise_s, rel=0.01)
    for name in ("read_bytes", "host_copy_bytes", "link_bytes"):
        assert getattr(few, name) == getattr(every, name)


def test_residents_are_read_once_and_streamed_blocks_at_every_visit() -> None:
    resident, streamed = clock()(plan_of(CHOICES[3])), clock()(plan_of(CHOICES[0]))
    assert resident is not None
    assert streamed is not None
    slot = plan_of(CHOICES[0]).slot_bytes
    assert resident.read_bytes == resident.link_bytes == 2 * 40 * slot
    assert streamed.read_bytes == streamed.link_bytes == 2 * 40 * 40 * slot
    assert streamed.overhead > 1 > 0.01 > resident.overhead
    assert resident.compute_s < resident.denoise_s < streamed.denoise_s


def test_one_branch_is_half_of_the_work() -> None:
    both, one = clock()(plan_of(CHOICES[3])), clock(branches=(1, 1))(plan_of(CHOICES[3]))
    assert both is not None
    assert one is not None
    assert one.compute_s == pytest.approx(both.compute_s / 2)


def test_one_step_has_no_switch() -> None:
    prediction = clock(1)(plan_of(CHOICES[0]))
    assert prediction is not None
    assert prediction.switch_stall_s == 0
    assert prediction.denoise_s > 0


def test_a_host_predicts_too() -> None:
    machine = dataclasses.replace(CARD, device="cpu")
    prediction = clock(3, machine=machine)(plan_of(PlanChoice(64, 2, 4, 10, False), device="cpu"))
    assert prediction is not None
    assert prediction.video_s == pytest.approx(sum(prediction.phase_s.values()))


def test_a_faster_machine_is_never_predicted_to_be_slower() -> None:
    plans = [plan_of(choice) for choice in CHOICES]
    faster = profile(
        link_bytes_s=2 * CARD.link_bytes_s,
        disk_bytes_s=2 * CARD.disk_bytes_s,
        gemm_int8_ops_s=2 * CARD.gemm_int8_ops_s,
    )
    for plan in plans:
        slow, fast = clock()(plan), clock(machine=faster)(plan)
        assert slow is not None
        assert fast is not None
        assert fast.video_s <= slow.video_s


def test_what_is_printed_for_scripts() -> None:
    prediction = clock()(plan_of(CHOICES[1]))
    assert prediction is not None
    data = json.loads(json.dumps(prediction.to_dict()))
    assert data["machine"] == "RTX 4090"
    assert data["basis"] == "predicted"
    assert data["video_s"] == pytest.approx(
        sum(data[f"{phase}_s"] for phase in ("text", "conditioning", "denoise", "decode"))
    )


def test_image_to_video_is_predicted_with_its_own_schedule() -> None:
    sampling = I2V_A14B.sampling
    assert high_noise_steps(40, sampling.shift, sampling.boundary) == 15  # spec 5.1


def test_the_overhead_is_that_of_the_budgets_and_short_chunks_are_part_of_it() -> None:
    """The smallest budgets of 720p: nothing waits for a block, yet chunks of 64 tokens take almost
    twice the time.
    """
    machine = find_card("RTX 3060 12GB").profile(2 * 10**9)
    forecast = clock(machine=machine)
    plans = [
        choose_plan(
            Workload.of(T2V_A14B, "int8", HD, 81, 40),
            Host.of("cuda"),
            vram,
            ram,
            clock=forecast,
            pinned_limit_bytes=machine.pinned_limit_bytes,
        )
        for vram, ram in ((3593 * 2**20, 2 * 10**9), (2**40, 2**40))
    ]
    small, unbounded = (plan.prediction for plan in plans)
    assert small is not None
    assert unbounded is not None
    assert (plans[0].choice.chunk_tokens, plans[1].choice.chunk_tokens) == (64, 8192)
    assert plans[1].choice.resident_blocks == 40
    assert (
        unbounded.step_s
        == pytest.approx(unbounded.resident_step_s)
        == pytest.approx(unbounded.compute_step_s)
    )
    assert unbounded.overhead == pytest.approx(0, abs=1e-9)
    assert small.resident_step_s == unbounded.resident_step_s
    assert small.overhead == pytest.approx(small.step_s / unbounded.step_s - 1)
    assert 0.9 < small.overhead < 1.1
    assert small.step_s / small.compute_step_s < 1.01, "what waiting for blocks costs is told apart"
    assert small.to_dict()["overhead"] == small.overhead
    assert small.to_dict()["resident_step_s"] == small.resident_step_s


@pytest.mark.parametrize("tokens", [(64, 48, 5), (64, 64, 9), (832, 480, 81)])
def test_no_plan_is_faster_than_one_without_budgets(tokens: tuple[int, int, int]) -> None:
    *size, frames = tokens
    for chunk in (64, 128, 512, 4096, 8192):
        for joint in (False, True):
            prediction = clock()(
                plan_of(PlanChoice(chunk, 0, 40, 0, joint), (size[0], size[1]), frames)
            )
            assert prediction is not None
            assert prediction.step_s >= prediction.resident_step_s * (1 - 1e-9)
