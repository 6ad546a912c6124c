"""The plan of a device of its own against a model of torch's caching allocator: what other programs
see (promise 17).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowvram import pipeline as pipeline_module
from lowvram import run as run_module
from lowvram.doctor import measure
from lowvram.hardware import budgets as budget
from lowvram.memory import out_of_memory
from lowvram.models.wan import Conditioning, EmbeddingsAndHead, condition, load_embeddings_and_head
from lowvram.pipeline import Pipeline, moved
from lowvram.planner import allocator as segment_sizes
from lowvram.planner import wan as formulas
from lowvram.planner.phases import CUDA_CONTEXT_BYTES, Host, PlanChoice
from lowvram.progress import Progress
from lowvram.request import Workload
from lowvram.sampling import recovery
from lowvram.sampling.denoise import Expert
from lowvram.sampling.schedule import make_schedule
from lowvram.sampling.solvers import Euler
from lowvram.store.layout import component_layout
from lowvram.store.reader import StoreFile, open_store
from lowvram.variants import (
    I2V_A14B,
    T2V_A14B,
    DiTConfig,
    ModelConfig,
    TextEncoderConfig,
    VAEConfig,
)
from tests.helpers.checkpoints import tiny_config, write_store
from tests.helpers.runs import CPU, plan_of
from tests.helpers.segments import MIB, Replay, Segments

STEPS = 40
META = torch.device("meta")


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B])
def test_p17_what_an_expert_keeps_is_moved_together(config: ModelConfig) -> None:
    """At the real size: left where they are made, some megabytes keep segments of weights; made
    anew they take what the plan says.
    """
    workload = Workload.of(config, "int8", steps=STEPS)
    shapes = {
        tensor.name: tensor.shape for tensor in component_layout("high_noise", config, "int8").rest
    }
    weight = torch.zeros((), dtype=torch.bfloat16)
    features = [weight.expand(512, config.dit.text_dim)] * 2
    segments = Segments()

    def read(name: str) -> torch.Tensor:
        return weight.expand(shapes[name])

    with torch.no_grad(), Replay(segments, "meta"):
        made = condition(read, config.dit, "int8", torch.arange(STEPS), features, META)
        ends = load_embeddings_and_head(read, "int8", META)
    kept = [made.time, made.modulation, *made.contexts, *ends]
    assert [tensor.nbytes for tensor in kept] == formulas._conditioning_tensors(workload)
    segments.empty()
    assert segments.reserved > 4 * sum(tensor.nbytes for tensor in kept)
    together = Segments()
    for _ in range(2):
        for tensor in kept:
            together.allocate(tensor.nbytes)
    assert together.reserved == segment_sizes.segments_bytes(
        2 * formulas._conditioning_tensors(workload)
    )
    assert together.reserved < 2 * sum(tensor.nbytes for tensor in kept) + 40 * MIB


@pytest.mark.parametrize(
    "sizes",
    [
        [5 * MIB] * 5,
        [9 * MIB] * 3,
        [10 * MIB, 11 * MIB - 5],
        [1, 600, MIB, MIB + 1],
        [3 * MIB, 600_000, 17 * MIB, 30 * MIB + 1, 9 * MIB],
    ],
)
def test_segments_are_those_of_the_allocator(sizes: list[int]) -> None:
    segments = Segments()
    for nbytes in sizes:
        segments.allocate(nbytes)
    assert segment_sizes.segments_bytes(sizes) == segments.reserved


@pytest.mark.parametrize("nbytes", [300_000, 3 * MIB, 9 * MIB, 16 * MIB + 1, 352 * 10**6])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_many_equal_buffers_take_no_more_than_their_share(nbytes: int, count: int) -> None:
    bound = count * segment_sizes.packed_bytes(nbytes) + (
        segment_sizes.SEGMENT_BYTES if nbytes < segment_sizes.LARGE_BYTES else 0
    )
    assert segment_sizes.segments_bytes([nbytes] * count) <= bound


def test_moving_changes_no_bit() -> None:
    values = [
        torch.randn(3, 4),
        torch.randn(3, 6, 4),
        torch.randn(5, 4).bfloat16(),
        *(torch.randn(4, count) for count in range(1, 6)),
    ]
    before = Expert(
        Conditioning(values[0], values[1], (values[2],)), EmbeddingsAndHead(*values[3:])
    )
    after = moved(before, CPU)
    pairs = [
        (*expert.conditioning[:2], *expert.conditioning.contexts, *expert.ends)
        for expert in (before, after)
    ]
    for old, new in zip(*pairs, strict=True):
        assert torch.equal(old, new)
        assert old.dtype == new.dtype
        assert old.data_ptr() != new.data_ptr()


def follow_hand_backs(segments: Segments, monkeypatch: pytest.MonkeyPatch) -> Segments:
    """The cache is emptied wherever a run on a GPU empties it."""
    real = out_of_memory.release_cached_memory

    def release_cached_memory(device: torch.device) -> None:
        real(device)
        segments.empty()

    for module in (out_of_memory, recovery, pipeline_module):
        monkeypatch.setattr(module, "release_cached_memory", release_cached_memory)
    return segments


CHOICES = {
    "two slots": PlanChoice(1024, 2, 0, 0, False),
    "resident, shared visits": PlanChoice(2048, 0, 2, 0, True),
    "smallest": PlanChoice(64, 1, 0, 0, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_p17_segments_of_a_run_stay_under_the_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operator of text, conditioning and loop, replayed; what the cache keeps between them
    included.
    """
    text = TextEncoderConfig(
        vocab_size=128, d_model=512, num_heads=8, head_dim=64, d_ff=1280, num_layers=2
    )
    config = ModelConfig(
        "t2v-custom",
        DiTConfig(dim=1024, ffn_dim=2816, num_heads=8, num_layers=2, text_dim=512),
        text,
        VAEConfig(base_dim=8),
    )
    segments, peaks, phase = follow_hand_backs(Segments(), monkeypatch), dict[str, int](), [""]

    def listen(event: Progress) -> None:
        if event.phase != phase[0]:
            phase[0], segments.peak_reserved = event.phase, segments.reserved
        peaks[phase[0]] = segments.peak_reserved

    read = StoreFile.read

    def copied(file: StoreFile, name: str) -> torch.Tensor:
        """On a device each weight is a copy, made in an empty cache (`models.wan.condition`)."""
        if phase[0] == "conditioning" and name.endswith(".weight"):
            segments.empty()
        return read(file, name).clone()

    monkeypatch.setattr(StoreFile, "read", copied)
    with open_store(write_store(tmp_path / "model", config, "int8")) as store:
        pipeline = Pipeline(store, CPU, 2**40, 2**40, 10**9)
        pipeline.host = Host(staged=False, context_bytes=600 * 10**6)
        request = pipeline.request("a ball " * 300, width=512, height=256, num_frames=9, steps=3)
        plan = plan_of(pipeline, request, CHOICES[name])
        with torch.no_grad(), Replay(segments, "cpu"):
            pipeline.latents(pipeline.new_run(request, plan, listen))
    planned = {each.phase: each.vram_bytes - pipeline.host.context_bytes for each in plan.phases}
    assert set(peaks) == {"text", "conditioning", "denoise"}
    assert all(peaks[name] <= planned[name] for name in peaks), (peaks, planned)


class WithoutPrompts(Pipeline):
    """Its prompts are random features."""

    def _encode_prompts(self, run: run_module.Run) -> list[torch.Tensor]:
        return [torch.randn(20, self.store.config.dit.text_dim) for _ in range(2)]


@dataclass(frozen=True)
class Held:
    """Bytes at the end of a step: what the cache holds, the most since the step before, and what
    tensors take of it.
    """

    reserved: int
    peak_reserved: int
    used: int


def held_after_steps(
    folder: Path, solver: str, choice: PlanChoice, monkeypatch: pytest.MonkeyPatch
) -> list[Held]:
    """Six steps, three of either expert."""
    segments, held = follow_hand_backs(Segments(), monkeypatch), list[Held]()

    def listen(event: Progress) -> None:
        if event.phase == "denoise" and event.done:
            held.append(Held(segments.reserved, segments.peak_reserved, segments.used))
            segments.peak_reserved = segments.reserved

    times = make_schedule(solver, 6, 5.0).timesteps.tolist()
    with open_store(write_store(folder / "model", tiny_config(), "int8")) as store:
        pipeline = WithoutPrompts(store, CPU, 2**40, 2**40, 10**9)
        pipeline.host = Host(staged=False, context_bytes=600 * 10**6)
        boundary = (times[2] + times[3]) / 2000
        request = pipeline.request(
            "a",
            width=64,
            height=64,
            num_frames=9,
            steps=6,
            shift=5.0,
            boundary=boundary,
            solver=solver,
        )
        with torch.no_grad(), Replay(segments, "cpu"):
            pipeline.latents(pipeline.new_run(request, plan_of(pipeline, request, choice), listen))
    assert len(held) == 6
    return held


@pytest.mark.parametrize(
    ("solver", "steady", "choice"),
    [("euler", 1, "two slots"), ("unipc", 2, "resident, shared visits")],
)
def test_the_loop_takes_nothing_more_after_the_first_step(
    solver: str, steady: int, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second expert takes nothing that the first has not taken. UniPC's second step, and none
    after it, keeps two tensors more: a corrected sample, where the first step's is the noise
    itself, and the clean sample of the step before.
    """
    held = held_after_steps(tmp_path, solver, CHOICES[choice], monkeypatch)
    assert [each.peak_reserved for each in held[steady:]] == [held[steady - 1].reserved] * (
        6 - steady
    )
    assert len({each.used for each in held[steady - 1 :]}) == 1
    sample = 16 * 3 * 8 * 8 * 4
    assert held[steady - 1].used - held[0].used == (2 * sample if solver == "unipc" else 0)
    assert held[steady - 1].reserved - held[0].reserved <= 2 * segment_sizes.segment_bytes(
        sample
    ) * (steady - 1)


def test_a_loop_that_keeps_a_tensor_of_every_step_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the test above able to fail: a solver that keeps its velocities."""
    kept: list[torch.Tensor] = []
    step = Euler.step

    def keep(self: Euler, x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        kept.append(velocity.repeat(80, 1, 1, 1))
        return step(self, x, velocity)

    monkeypatch.setattr(Euler, "step", keep)
    held = held_after_steps(tmp_path, "euler", CHOICES["smallest"], monkeypatch)
    assert all(after.used > before.used for before, after in pairwise(held))
    assert held[-1].reserved > held[0].reserved


@pytest.mark.parametrize(
    ("measured", "context"),
    [(None, CUDA_CONTEXT_BYTES), (1, CUDA_CONTEXT_BYTES), (9 * 10**8, 9 * 10**8)],
)
def test_a_gpu_by_number_becomes_the_current_one_and_its_context_counts(
    measured: int | None, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not below what is assumed: code that loads later comes on top of what was measured."""
    (tmp_path / "lowvram.json").write_text("{}")
    current: list[torch.device] = []
    asked: list[list[torch.device]] = []
    monkeypatch.setattr(
        budget,
        "resolve_budgets",
        lambda vram, ram, device: budget.Budgets(device, 2**33, 2**34, 10**9, measured),
    )
    monkeypatch.setattr(measure, "this_machine", lambda device: asked.append([*current]))
    monkeypatch.setattr(
        pipeline_module,
        "open_store",
        lambda path, allow_links: SimpleNamespace(path=path, format="int8"),
    )
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    loaded = pipeline_module.load(tmp_path, device="cuda:1", prompt_cache=False)
    assert asked == [[torch.device("cuda", 1)]], "set before anything asks which machine this is"
    assert loaded.host.context_bytes == context
    assert loaded.host.rounds
    pipeline_module.load(tmp_path, device="cuda", prompt_cache=False)
    assert len(current) == 1
