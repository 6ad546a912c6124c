"""Real denoising steps of a random model of true A14B shapes within capped budgets, beside everything resident and beside diffusers.

Steps run across the expert switch. A row says what was measured and what was planned; where a budget is too small for any plan, it says
that and no number.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_timing import machine, write_csv
from plots import Bar, bars, timeline_plot, write_svg
from random_store import FORMAT, bench_config, write_random_store
from timed_transport import TimedCuda, TimedHost, Timeline
from torch import Tensor

from lowvram.checkpoint.store import Store, open_store
from lowvram.config import EXPERTS, ModelConfig, Request, format_bytes, latent_shape, parse_size
from lowvram.errors import BudgetError
from lowvram.memory.budget import PROCESS_GROWTH_BYTES
from lowvram.memory.measure import measure_profile
from lowvram.memory.plan import Host, MemoryPlan
from lowvram.memory.profile import MachineProfile
from lowvram.pipeline import Pipeline
from lowvram.progress import Progress
from lowvram.run import Run
from lowvram.sampling.schedule import make_schedule
from lowvram.streaming.source import BlockFile
from lowvram.streaming.transport import Transport

GB = 10**9
SHIFT = 5.0
PROMPT_TOKENS = 64
RSS_PERIOD_S = 0.02


@dataclass(frozen=True)
class StreamRow:
    """One provider under one pair of budgets at one size. Empty: not measured, or of no meaning there; `note` says why.

    overhead: of the median step against lowvram with everything resident; switch_s: the first step of the second expert;
    predicted_s: the plan's prediction of a step, from `rates` "measured" here or of a "table".
    """

    provider: str
    size: str
    frames: int
    tokens: int
    layers: int
    vram_budget_gb: float | None = None
    ram_budget_gb: float | None = None
    resident: int | None = None
    ring: int | None = None
    host: int | None = None
    pinned: int | None = None
    chunk: int | None = None
    joint: bool | None = None
    step_s: float | None = None
    steps_s: str = ""
    switch_s: float | None = None
    overhead: float | None = None
    peak_vram_gb: float | None = None
    planned_vram_gb: float | None = None
    peak_rss_gb: float | None = None
    planned_ram_gb: float | None = None
    predicted_s: float | None = None
    predicted_switch_stall_s: float | None = None
    rates: str = ""
    disk_gb_s: float | None = None
    latents_sha256: str = ""
    gpu: str = ""
    torch: str = ""
    commit: str = ""
    note: str = ""


class BenchPipeline(Pipeline):
    """A pipeline whose prompts are random features, and whose device is reached through staging buffers also where it is the host."""

    def __init__(
        self, store: Store, device: torch.device, vram_bytes: int, ram_bytes: int, host: Host, profile: MachineProfile | None = None
    ) -> None:
        super().__init__(store, device, vram_bytes, ram_bytes, host.process_bytes, profile)
        self.host = replace(host, staged=True)
        self.timed: TimedCuda | TimedHost | None = None

    def _encode_prompts(self, run: Run) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(PROMPT_TOKENS, self.store.config.dit.text_dim, generator=generator) for _ in range(2)]

    def _transport(self) -> Transport:
        self.timed = TimedCuda(self.device) if self.device.type == "cuda" else TimedHost()
        return self.timed


class PeakRss:
    """The largest resident size of this process while the context is open, sampled every 20 ms."""

    def __enter__(self) -> PeakRss:
        self.nbytes = psutil.Process().memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(RSS_PERIOD_S):
            self.nbytes = max(self.nbytes, process.memory_info().rss)


@contextmanager
def vram_cap(device: torch.device, nbytes: int) -> Iterator[None]:
    """Torch's allocator refuses more than `nbytes` on a CUDA device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def request_of(pipeline: Pipeline, size: tuple[int, int], frames: int, steps: int) -> Request:
    """`steps` steps, whose second half is the second expert's."""
    times = make_schedule("unipc", steps, SHIFT).timesteps.tolist()
    middle = steps // 2
    boundary = (times[middle - 1] + times[middle]) / 2 / 1000
    return pipeline.request("random features", size=size, frames=frames, steps=steps, shift=SHIFT, boundary=boundary)


def disk_speed(store: Store) -> float:
    """GB/s of the reader that the streamer uses, over the first blocks of one expert."""
    file = store.files[EXPERTS[0]]
    reader = BlockFile(file.path, [(block.start, block.nbytes) for block in file.blocks[:8]])
    buffer = torch.empty(file.blocks[0].nbytes + 3 * 4096, dtype=torch.uint8)
    begin = time.perf_counter()
    done = sum(reader.read_into(block, buffer).numel() for block in range(len(reader.ranges)))
    seconds = time.perf_counter() - begin
    reader.close()
    return done / GB / seconds


def context_bytes(device: torch.device) -> int:
    """What the driver keeps of the device beside torch's allocator, with nothing else on it."""
    if device.type != "cuda":
        return 0
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


@dataclass(frozen=True)
class Case:
    """One size with its pairs of budgets in bytes (vram, ram); the first pair holds everything on the device."""

    size: tuple[int, int]
    frames: int
    steps: int
    budgets: Sequence[tuple[int, int]]


def lowvram_rows(
    store: Store, case: Case, device: torch.device, profile: MachineProfile | None = None
) -> Iterator[tuple[StreamRow, Timeline]]:
    resident_s: float | None = None
    speed = disk_speed(store)
    for vram, ram in case.budgets:
        gc.collect()
        host = Host(True, context_bytes(device), psutil.Process().memory_info().rss + PROCESS_GROWTH_BYTES)
        pipeline = BenchPipeline(store, device, vram, ram, host, profile)
        request = request_of(pipeline, case.size, case.frames, case.steps)
        row = _row(f"lowvram {FORMAT}", store.config, case, vram, ram)
        try:
            plan = pipeline.plan(request)
        except BudgetError as error:
            yield replace(row, note=f"not measured: {error}"), Timeline()
            continue
        measured, timeline = _measure(pipeline, request, plan, device)
        resident_s = resident_s or measured["step_s"]
        yield replace(row, overhead=measured["step_s"] / resident_s - 1, disk_gb_s=speed, **measured), timeline


def _row(provider: str, config: ModelConfig, case: Case, vram: int | None, ram: int | None) -> StreamRow:
    tokens = latent_shape(config, *case.size, case.frames).num_tokens
    budgets = (None if amount is None else amount / GB for amount in (vram, ram))
    row = StreamRow(provider, "x".join(map(str, case.size)), case.frames, tokens, config.dit.num_layers, *budgets)
    name, version, commit = machine()
    return replace(row, gpu=name, torch=version, commit=commit)


def _measure(pipeline: BenchPipeline, request: Request, plan: MemoryPlan, device: torch.device) -> tuple[dict[str, Any], Timeline]:
    ends: list[float] = []

    def listen(event: Progress) -> None:
        if event.phase == "denoise":
            ends.append(time.perf_counter())

    run = pipeline.new_run(request, plan, listen)
    with PeakRss() as rss, vram_cap(device, plan.peak_vram_bytes - pipeline.host.context_bytes), torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        latents = pipeline.latents(run)
        # The device's own peak; on a CPU, where nobody counts it, the ledger's.
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else run.vram.peak_bytes
    steps = [after - before for before, after in pairwise(ends)]
    choice = plan.choice
    denoise = next(phase for phase in plan.phases if phase.phase == "denoise")
    return {
        "resident": choice.resident_blocks,
        "ring": choice.ring_slots,
        "host": choice.host_blocks,
        "pinned": choice.pinned_blocks,
        "chunk": choice.chunk_tokens,
        "joint": choice.joint_guidance,
        **_predicted(plan),
        "step_s": statistics.median(steps[1:] or steps),  # the first step also fills the slots
        "steps_s": " ".join(f"{seconds:.4f}" for seconds in steps),
        "switch_s": steps[request.steps // 2],
        "peak_vram_gb": (reserved + pipeline.host.context_bytes) / GB,
        "planned_vram_gb": max(denoise.vram_bytes, plan.phases[1].vram_bytes) / GB,
        "peak_rss_gb": rss.nbytes / GB,
        "planned_ram_gb": max(phase.ram_bytes for phase in plan.phases) / GB,
        "latents_sha256": hashlib.sha256(latents.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
    }, pipeline.timed.timeline() if pipeline.timed is not None else Timeline()  # fmt: skip


def _predicted(plan: MemoryPlan) -> dict[str, Any]:
    found = plan.prediction
    if found is None:
        return {}
    return {"predicted_s": found.step_s, "predicted_switch_stall_s": found.switch_stall_s, "rates": found.basis}


def baseline_rows(config: ModelConfig, case: Case, device: torch.device) -> Iterator[StreamRow]:
    """diffusers' model of the same shapes, one expert with both guidance branches per step: bf16 resident and offloaded, quanto int8."""
    providers: dict[str, Callable[[Any], None]] = {"diffusers bf16 resident": lambda model: None}
    providers["diffusers bf16 group offloading, stream"] = lambda model: _offload(model, device)
    providers["diffusers optimum-quanto int8"] = _quantize
    for name, prepare in providers.items():
        row = _row(name, config, case, None, None)
        if "offloading" in name and device.type != "cuda":
            yield replace(row, note="not measured: group offloading with a stream needs a CUDA device")
            continue
        gc.collect()
        try:
            with PeakRss() as rss, torch.no_grad():
                model = _diffusers_model(config, device)
                prepare(model)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                steps = _diffusers_steps(model, config, case, device)
                peak = torch.cuda.max_memory_reserved(device) + context_bytes(device) if device.type == "cuda" else None
            note = "one expert; a run holds two"
            yield replace(
                row, step_s=statistics.median(steps[1:] or steps), steps_s=" ".join(f"{seconds:.4f}" for seconds in steps),
                peak_vram_gb=None if peak is None else peak / GB, peak_rss_gb=rss.nbytes / GB, note=note,
            )  # fmt: skip
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield replace(row, note=f"not measured: out of memory: {str(error).splitlines()[0] if str(error) else 'MemoryError'}")
        with suppress(UnboundLocalError):
            del model


def _diffusers_model(config: ModelConfig, device: torch.device) -> Any:
    from diffusers import WanTransformer3DModel

    dit, before = config.dit, torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return WanTransformer3DModel(
                patch_size=dit.patch_size, num_attention_heads=dit.num_heads, attention_head_dim=dit.head_dim, in_channels=dit.in_dim,
                out_channels=dit.out_dim, text_dim=dit.text_dim, freq_dim=dit.freq_dim, ffn_dim=dit.ffn_dim, num_layers=dit.num_layers,
            ).eval()  # fmt: skip
    finally:
        torch.set_default_dtype(before)


def _offload(model: Any, device: torch.device) -> None:
    model.to("cpu")
    model.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True)


def _quantize(model: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)


def _diffusers_steps(model: Any, config: ModelConfig, case: Case, device: torch.device) -> list[float]:
    shape = latent_shape(config, *case.size, case.frames)
    latents = torch.randn(1, *shape.shape, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, config.dit.text_len, config.dit.text_dim, device=device, dtype=torch.bfloat16)
    seconds = []
    for step in range(case.steps):
        begin = time.perf_counter()
        timestep = torch.tensor([900 - step], device=device)
        positive, negative = (model(latents, timestep, branch, return_dict=False)[0] for branch in (text, -text))
        bool(torch.isfinite(negative + 3 * (positive - negative)).all())  # waits for the device, as the sampling loop does
        seconds.append(time.perf_counter() - begin)
    return seconds


def run(
    store: Store,
    cases: Sequence[Case],
    device: torch.device,
    output: Path,
    baselines: bool = True,
    profile: MachineProfile | None = None,
) -> list[StreamRow]:
    """Measures every case, writing rows as they come: OUTPUT.csv, OUTPUT.svg (seconds per step against budget), a timeline per size."""
    rows: list[StreamRow] = []
    for case in cases:
        last = Timeline()
        for row, timeline in lowvram_rows(store, case, device, profile):
            rows.append(row)
            last = timeline if timeline.copies else last
            _report(output, rows)
        if last.copies:
            write_svg(
                output.with_name(f"{output.name}-timeline-{rows[-1].size}.svg"), timeline_plot(last, f"{rows[-1].size} x {case.frames}")
            )
        for row in baseline_rows(store.config, case, device) if baselines else ():
            rows.append(row)
            _report(output, rows)
    return rows


def _report(output: Path, rows: list[StreamRow]) -> None:
    row = rows[-1]
    took = f"{row.step_s:.3f} s per step" if row.step_s is not None else row.note
    budgets = f" within {row.vram_budget_gb:.1f} and {row.ram_budget_gb:.1f} GB" if row.vram_budget_gb and row.ram_budget_gb else ""
    print(f"{row.provider} {row.size} x {row.frames}{budgets}: {took}", flush=True)
    write_csv(output.with_suffix(".csv"), rows)
    write_svg(output.with_suffix(".svg"), bars(f"{row.gpu}, torch {row.torch}, {row.commit}", _bars(rows)))


def _bars(rows: Sequence[StreamRow]) -> list[Bar]:
    """Seconds per step of each row that was measured, grouped by size."""
    longest = max((row.step_s for row in rows if row.step_s is not None), default=1.0)
    found = []
    for row in rows:
        if row.step_s is None:
            continue
        budgets = f", {row.vram_budget_gb:.0f} + {row.ram_budget_gb:.0f} GB" if row.vram_budget_gb and row.ram_budget_gb else ""
        group = f"{row.size} x {row.frames}, seconds per step"
        found.append(Bar(group, row.provider + budgets, row.step_s / longest, f"{row.step_s:.3f}"))
    return found


def disagreements(rows: Sequence[StreamRow]) -> list[str]:
    """Sizes whose latents differ between budgets."""
    digests: dict[str, set[str]] = {}
    for row in rows:
        if row.latents_sha256:
            digests.setdefault(row.size, set()).add(row.latents_sha256)
    return [f"{size}: the budgets changed the latents: {', '.join(sorted(found))}" for size, found in digests.items() if len(found) > 1]


def exceeded(rows: Sequence[StreamRow]) -> list[str]:
    """Rows whose measured peak lies above the plan's."""
    pairs = (("VRAM", "peak_vram_gb", "planned_vram_gb"), ("RAM", "peak_rss_gb", "planned_ram_gb"))
    found = []
    for row in rows:
        for label, peak, planned in pairs:
            measured, allowed = getattr(row, peak), getattr(row, planned)
            if measured is not None and allowed is not None and measured > allowed:
                found.append(
                    f"{row.size} within {row.vram_budget_gb} + {row.ram_budget_gb} GB: {label} {measured:.3f} GB of {allowed:.3f} planned"
                )
    return found


def budgets_of(options: argparse.Namespace, total_vram: int) -> list[tuple[int, int]]:
    """Everything on the device with the largest RAM budget, then every pair."""
    largest = int(max(options.ram) * GB)
    return [(total_vram, largest)] + [(int(vram * GB), int(ram * GB)) for vram in options.vram for ram in options.ram]


def stream(options: argparse.Namespace, output: Path) -> int:
    """The benchmark on a CUDA machine; 1 where budgets changed the latents or a peak exceeded its plan."""
    if options.steps < 2:
        print("bench.py stream: --steps must be at least 2, so that the expert switch is among them", file=sys.stderr)
        return 2
    device, folder = torch.device("cuda"), options.work / f"a14b-{options.layers}"
    torch.zeros(1, device=device)
    store = open_store(folder) if (folder / "lowvram.json").exists() else write_random_store(folder, bench_config(options.layers))
    free, _ = torch.cuda.mem_get_info(device)
    budgets = budgets_of(options, free)
    cases = [Case(parse_size(size), options.frames, options.steps, budgets) for size in options.sizes]
    with store:
        print(f"random store at {folder}, disk {disk_speed(store):.2f} GB/s, {format_bytes(free)} of VRAM free")
        rows = run(store, cases, device, output, not options.no_baselines, measure_profile("cuda", options.work))
    problems = disagreements(rows) + exceeded(rows)
    for problem in problems:
        print(f"bench.py stream: {problem}", file=sys.stderr)
    return 1 if problems else 0
