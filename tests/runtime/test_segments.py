"""The plan of a device of its own against a model of torch's caching allocator: what other programs see (promise 15)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowvram import pipeline as pipeline_module
from lowvram import run as run_module
from lowvram.checkpoint.store import StoreFile, open_store
from lowvram.checkpoint.store_layout import component_layout
from lowvram.config import I2V_A14B, T2V_A14B, DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig
from lowvram.memory import budget, measure, phases
from lowvram.memory import segments as segment_sizes
from lowvram.memory.plan import CUDA_CONTEXT_BYTES, Choice, Host
from lowvram.models.wan import Conditioning, Ends, condition, load_ends
from lowvram.pipeline import Pipeline, moved
from lowvram.progress import Progress
from lowvram.sampling import recovery
from lowvram.sampling.denoise import Expert
from tests.checkpoints import write_store
from tests.runs import CPU, plan_of
from tests.segments import MIB, Replay, Segments

STEPS = 40
META = torch.device("meta")


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B])
def test_p15_what_an_expert_keeps_is_moved_together(config: ModelConfig) -> None:
    """At the real size: left where they are made, some megabytes keep segments of weights; made anew they take what the plan says."""
    shapes = {tensor.name: tensor.shape for tensor in component_layout("high_noise", config, "int8").rest}
    weight = torch.zeros((), dtype=torch.bfloat16)
    features = [weight.expand(512, config.dit.text_dim)] * 2
    segments = Segments()

    def read(name: str) -> torch.Tensor:
        return weight.expand(shapes[name])

    with torch.no_grad(), Replay(segments, "meta"):
        made = condition(read, config.dit, "int8", torch.arange(STEPS), features, META)
        ends = load_ends(read, "int8", META)
    kept = [made.time, made.modulation, *made.contexts, *ends]
    assert [tensor.nbytes for tensor in kept] == phases._conditioning_tensors(config, "int8", STEPS)
    segments.empty()
    assert segments.reserved > 5 * sum(tensor.nbytes for tensor in kept)
    together = Segments()
    for _ in range(2):
        for tensor in kept:
            together.allocate(tensor.nbytes)
    assert together.reserved == segment_sizes.segments_bytes(2 * phases._conditioning_tensors(config, "int8", STEPS))
    assert together.reserved < 2 * sum(tensor.nbytes for tensor in kept) + 40 * MIB


@pytest.mark.parametrize(
    "sizes",
    [[5 * MIB] * 5, [9 * MIB] * 3, [10 * MIB, 11 * MIB - 5], [1, 600, MIB, MIB + 1], [3 * MIB, 600_000, 17 * MIB, 30 * MIB + 1, 9 * MIB]],
)
def test_segments_are_those_of_the_allocator(sizes: list[int]) -> None:
    segments = Segments()
    for nbytes in sizes:
        segments.allocate(nbytes)
    assert segment_sizes.segments_bytes(sizes) == segments.reserved


@pytest.mark.parametrize("nbytes", [300_000, 3 * MIB, 9 * MIB, 16 * MIB + 1, 352 * 10**6])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_many_equal_buffers_take_no_more_than_their_share(nbytes: int, count: int) -> None:
    bound = count * segment_sizes.packed_bytes(nbytes) + (segment_sizes.SEGMENT_BYTES if nbytes < segment_sizes.LARGE_BYTES else 0)
    assert segment_sizes.segments_bytes([nbytes] * count) <= bound


def test_moving_changes_no_bit() -> None:
    values = [torch.randn(3, 4), torch.randn(3, 6, 4), torch.randn(5, 4).bfloat16(), *(torch.randn(4, count) for count in range(1, 6))]
    before = Expert(Conditioning(values[0], values[1], (values[2],)), Ends(*values[3:]))
    after = moved(before, CPU)
    pairs = [(*expert.conditioning[:2], *expert.conditioning.contexts, *expert.ends) for expert in (before, after)]
    for old, new in zip(*pairs, strict=True):
        assert torch.equal(old, new)
        assert old.dtype == new.dtype
        assert old.data_ptr() != new.data_ptr()


CHOICES = {
    "two slots": Choice(1024, 2, 0, 0, False),
    "resident, shared visits": Choice(2048, 0, 2, 0, True),
    "smallest": Choice(64, 1, 0, 0, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_p15_segments_of_a_run_stay_under_the_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator of text, conditioning and loop, replayed; what the cache keeps between them included."""
    text = TextEncoderConfig(vocab_size=128, d_model=512, num_heads=8, head_dim=64, d_ff=1280, num_layers=2)
    config = ModelConfig(
        "t2v-custom", DiTConfig(dim=1024, ffn_dim=2816, num_heads=8, num_layers=2, text_dim=512), text, VAEConfig(base_dim=8)
    )
    segments, peaks, phase = Segments(), dict[str, int](), [""]
    real = run_module.hand_back

    def hand_back(device: torch.device) -> None:
        real(device)
        segments.empty()

    def listen(event: Progress) -> None:
        if event.phase != phase[0]:
            phase[0], segments.peak_reserved = event.phase, segments.reserved
        peaks[phase[0]] = segments.peak_reserved

    for module in (run_module, recovery, pipeline_module):
        monkeypatch.setattr(module, "hand_back", hand_back)
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


@pytest.mark.parametrize(("measured", "context"), [(None, CUDA_CONTEXT_BYTES), (1, CUDA_CONTEXT_BYTES), (9 * 10**8, 9 * 10**8)])
def test_a_gpu_by_number_becomes_the_current_one_and_its_context_counts(
    measured: int | None, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not below what is assumed: code that loads later comes on top of what was measured."""
    (tmp_path / "lowvram.json").write_text("{}")
    current: list[torch.device] = []
    asked: list[list[torch.device]] = []
    monkeypatch.setattr(budget, "resolve_budgets", lambda vram, ram, device: budget.Budgets(device, 2**33, 2**34, 10**9, measured))
    monkeypatch.setattr(measure, "this_machine", lambda device: asked.append([*current]))
    monkeypatch.setattr(pipeline_module, "open_store", lambda path: SimpleNamespace(path=path))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    loaded = pipeline_module.load(tmp_path, device="cuda:1", prompt_cache=False)
    assert asked == [[torch.device("cuda", 1)]], "set before anything asks which machine this is"
    assert loaded.host.context_bytes == context
    assert loaded.host.rounds
    pipeline_module.load(tmp_path, device="cuda", prompt_cache=False)
    assert len(current) == 1
