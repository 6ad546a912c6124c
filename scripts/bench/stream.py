"""Real denoising steps of a random model of true A14B shapes within capped budgets, beside
everything resident and beside diffusers.

Steps run across the expert switch. A row says what was measured and what was planned; where a
budget is too small for any plan, it says that and no number. On a CPU the same command is a
rehearsal: rows carry the processor's name, and peaks of VRAM are the ledger's.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from lowvram.doctor.measure import measure_profile
from lowvram.errors import BudgetError
from lowvram.hardware.budgets import PROCESS_GROWTH_BYTES
from lowvram.hardware.cgroups import host_memory
from lowvram.hardware.profile import MachineProfile
from lowvram.memory.cap import vram_cap
from lowvram.memory.malloc import return_freed_memory
from lowvram.memory.out_of_memory import is_out_of_memory
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import MemoryPlan
from lowvram.progress import Listener, Progress, silent
from lowvram.request import Request, latent_shape
from lowvram.run import Run
from lowvram.sampling.schedule import make_schedule
from lowvram.store.reader import Store, open_store
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import BlockId
from lowvram.streaming.stream import Buffers
from lowvram.streaming.transport import Transport
from lowvram.units import format_bytes, parse_size
from lowvram.variants import EXPERTS, ModelConfig
from scripts.bench.diffusers_model import baselines, new_model, time_steps
from scripts.bench.plots import bars, timeline_plot, write_svg
from scripts.bench.random_store import FORMAT, bench_config, write_random_store
from scripts.bench.stream_goals import report_goals
from scripts.bench.stream_rows import (
    FAILED,
    GAVE_UP,
    NOT_MEASURED,
    SAME_PLAN,
    StreamRow,
    machine_of,
    merged,
    problems,
    read_rows,
    row_bars,
)
from scripts.bench.timed_transport import TimedCuda, TimedHost, TimedStreamer
from scripts.bench.timeline import TimedVisit, Timeline, stall_seconds
from scripts.bench.timing import reason, write_csv

GB = 10**9
SHIFT = 5.0
PROMPT_TOKENS = 64
RSS_PERIOD_S = 0.02


class TimedRun(Run):
    """A run that notes every visit of its last stream, and what it gave up of its plan on the
    way.
    """

    pipeline: BenchPipeline
    gave_up: tuple[str, ...] = ()

    def go_on_with(self, plan: MemoryPlan) -> None:
        before, after = asdict(self.plan.choice), asdict(plan.choice)
        self.gave_up += tuple(
            f"{name} {before[name]} -> {after[name]}"
            for name in before
            if before[name] != after[name]
        )
        super().go_on_with(plan)

    @contextmanager
    def stream(self, schedule: Sequence[BlockId], buffers: Buffers) -> Iterator[TimedStreamer]:
        with super().stream(schedule, buffers) as streamer:
            yield TimedStreamer(streamer, self.pipeline.timed)


class BenchPipeline(Pipeline):
    """A pipeline whose prompts are random features, and whose device is reached through staging
    buffers also where it is the host.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        vram_bytes: int,
        ram_bytes: int,
        host: Host,
        profile: MachineProfile | None = None,
    ) -> None:
        super().__init__(store, device, vram_bytes, ram_bytes, host.process_bytes, profile)
        self.host = replace(host, staged=True, values=self.host.values)
        self.timed: TimedCuda | TimedHost

    def new_run(self, request: Request, plan: MemoryPlan, listener: Listener = silent) -> TimedRun:
        run = TimedRun(self.store, self.device, self.host, request, plan, listener, self._transport)
        run.pipeline = self
        return run

    def _encode_prompts(self, run: Run) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(PROMPT_TOKENS, self.store.config.dit.text_dim, generator=generator)
            for _ in range(2)
        ]

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


def request_of(pipeline: Pipeline, size: tuple[int, int], frames: int, steps: int) -> Request:
    """`steps` steps, whose second half is the second expert's."""
    times = make_schedule("unipc", steps, SHIFT).timesteps.tolist()
    middle = steps // 2
    boundary = (times[middle - 1] + times[middle]) / 2 / 1000
    return pipeline.request(
        "random features", size=size, frames=frames, steps=steps, shift=SHIFT, boundary=boundary
    )


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


def outside_torch_bytes(device: torch.device) -> int:
    """What is taken of the device now and does not belong to torch's allocator; makes a context
    where there is none. 0 on a CPU.

    `lowvram.hardware.machine.context_bytes` is asked once, before this process has a context, and
    leaves other programs out. Here the context has grown with every kernel since, and a row must
    count all that the cap on torch's allocator leaves to others: before each row, anew.
    """
    if device.type != "cuda":
        return 0
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def taken_bytes(device: torch.device) -> int:
    """What is taken of the device before a run: beside torch's allocator, and in it the workspaces
    that libraries keep. 0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    square = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    torch.mm(square, square)
    del square
    torch.cuda.empty_cache()
    return outside_torch_bytes(device) + torch.cuda.memory_reserved(device)


@dataclass(frozen=True)
class Case:
    """One size with its pairs of budgets in bytes (vram, ram); the first pair holds everything on
    the device.
    """

    size: tuple[int, int]
    frames: int
    steps: int
    budgets: Sequence[tuple[int, int]]


def tidy(device: torch.device) -> None:
    """Hands back all that a provider has left behind: on the device, and in torch's cache of
    page-locked memory, which counts as RAM.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def lowvram_rows(
    store: Store,
    case: Case,
    device: torch.device,
    profile: MachineProfile | None = None,
    disk_gb_s: float | None = None,
) -> Iterator[tuple[StreamRow, Timeline]]:
    """A row per pair of budgets; of pairs that lead to the same plan, the first is measured. A row
    that fails says why.
    """
    resident_s: float | None = None
    measured: dict[PlanChoice, str] = {}
    for number, (vram, ram) in enumerate(dict.fromkeys(case.budgets)):
        row, timeline = (
            replace(
                _row(f"lowvram {FORMAT}", store.config, case, device, vram, ram),
                disk_gb_s=disk_gb_s,
            ),
            Timeline(),
        )
        try:
            tidy(device)
            references = Host.of(device.type).references
            host = Host(
                True,
                taken_bytes(device),
                psutil.Process().memory_info().rss + PROCESS_GROWTH_BYTES,
                references,
            )
            pipeline = BenchPipeline(store, device, vram, ram, host, profile)
            request = request_of(pipeline, case.size, case.frames, case.steps)
            plan = pipeline.plan(request)
            if plan.choice in measured:
                row = replace(row, disk_gb_s=None, note=f"{SAME_PLAN}{measured[plan.choice]}")
            else:
                values, timeline = _measure(pipeline, request, plan, device)
                row = replace(row, **values)
        except BudgetError as error:
            row = replace(row, note=f"{NOT_MEASURED}{error}")
        except Exception as error:
            row = replace(row, note=f"{FAILED}{_cause(error)}")
        if row.step_s is not None and not row.note:
            measured[plan.choice] = row.budgets
            if number == 0 and row.resident == row.layers:
                resident_s = row.step_s
            row = replace(row, overhead=None if resident_s is None else row.step_s / resident_s - 1)
        yield row, timeline


def _cause(error: Exception) -> str:
    return (
        f"{'out of memory' if is_out_of_memory(error) else type(error).__name__}: {reason(error)}"
    )


def _row(
    provider: str,
    config: ModelConfig,
    case: Case,
    device: torch.device,
    vram: int | None = None,
    ram: int | None = None,
) -> StreamRow:
    tokens = latent_shape(config, *case.size, case.frames).num_tokens
    vram_gb, ram_gb = (None if amount is None else amount / GB for amount in (vram, ram))
    row = StreamRow(
        provider,
        "x".join(map(str, case.size)),
        case.frames,
        tokens,
        config.dit.num_layers,
        case.steps,
        vram_gb,
        ram_gb,
    )
    name, version, commit = machine_of(device.type)
    return replace(row, gpu=name, torch=version, commit=commit)


def _measure(
    pipeline: BenchPipeline, request: Request, plan: MemoryPlan, device: torch.device
) -> tuple[dict[str, Any], Timeline]:
    """A row's values and its timeline. Where the run left its plan, they are of the plan that it
    ended with, and `note` says so.
    """
    ends: list[float] = []

    def listen(event: Progress) -> None:
        if event.phase == "denoise":
            ends.append(time.perf_counter())

    run = pipeline.new_run(request, plan, listen)
    with (
        PeakRss() as rss,
        vram_cap(device, plan.peak_vram_bytes - pipeline.host.context_bytes),
        torch.no_grad(),
    ):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            kept = torch.cuda.memory_reserved(device)  # of libraries, counted as context
        latents = pipeline.latents(run)
        # The device's own peak; on a CPU, where nobody counts it, the ledger's.
        reserved = (
            torch.cuda.max_memory_reserved(device) - kept
            if device.type == "cuda"
            else run.vram.peak_bytes
        )
    steps = [after - before for before, after in pairwise(ends)]
    plan, choice, timeline = run.plan, run.plan.choice, pipeline.timed.timeline()
    conditioning, denoise = (
        next(phase for phase in plan.phases if phase.phase == name)
        for name in ("conditioning", "denoise")
    )
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
        **({} if run.gave_up else stalls(timeline.visits, request.steps)),
        "peak_vram_gb": (reserved + pipeline.host.context_bytes) / GB,
        "planned_vram_gb": max(denoise.vram_bytes, conditioning.vram_bytes) / GB,
        "peak_rss_gb": rss.nbytes / GB,
        "planned_ram_gb": max(phase.ram_bytes for phase in plan.phases) / GB,
        "latents_sha256": hashlib.sha256(
            latents.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest(),
        "note": f"{GAVE_UP}{', '.join(run.gave_up)}" if run.gave_up else "",
    }, timeline


def stalls(visits: Sequence[TimedVisit], steps: int) -> dict[str, float]:
    """Of all visits of a run whose second half is the second expert's: a block's time, the stall
    after the first step and the switch's.
    """
    first, second = ([visit for visit in visits if visit.component == name] for name in EXPERTS)
    per_step, per_second = len(first) // (steps // 2), len(second) // (steps - steps // 2)
    return {
        "block_s": statistics.median(visit.end_s - visit.start_s for visit in visits),
        "stall_s": stall_seconds(visits[per_step:]),
        "switch_stall_s": stall_seconds(second[:per_second]),
    }


def _predicted(plan: MemoryPlan) -> dict[str, Any]:
    found = plan.prediction
    if found is None:
        return {}
    return {
        "predicted_s": found.step_s,
        "predicted_switch_stall_s": found.switch_stall_s,
        "rates": found.basis,
    }


def baseline_rows(
    config: ModelConfig, case: Case, device: torch.device, only: str = ""
) -> Iterator[StreamRow]:
    """diffusers' model of the same shapes, one expert with both guidance branches per step: bf16
    resident and offloaded, quanto int8.

    only: what a provider's name must contain. A provider that fails gives a row without numbers.
    """
    for name, prepare in baselines(device).items():
        row = _row(name, config, case, device)
        if only not in name:
            continue
        if "offloading" in name and device.type != "cuda":
            yield replace(
                row, note=f"{NOT_MEASURED}group offloading with a stream needs a CUDA device"
            )
            continue
        try:
            tidy(device)
            row = replace(row, **_measure_baseline(prepare, config, case, device))
        except Exception as error:
            row = replace(row, note=f"{NOT_MEASURED}{_cause(error)}")
        yield row


def _measure_baseline(
    prepare: Callable[[Any], None], config: ModelConfig, case: Case, device: torch.device
) -> dict[str, Any]:
    with PeakRss() as rss, torch.no_grad():
        model = new_model(config, device)
        prepare(model)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        steps = time_steps(model, config, case.size, case.frames, case.steps, device)
        peak = (
            torch.cuda.max_memory_reserved(device) + outside_torch_bytes(device)
            if device.type == "cuda"
            else None
        )
    return {
        "step_s": statistics.median(steps[1:] or steps),
        "steps_s": " ".join(f"{seconds:.4f}" for seconds in steps),
        "peak_vram_gb": None if peak is None else peak / GB,
        "peak_rss_gb": rss.nbytes / GB,
        "note": "one expert; a run holds two",
    }


def run(
    store: Store | None,
    config: ModelConfig,
    cases: Sequence[Case],
    device: torch.device,
    output: Path,
    only: str = "",
    profile: MachineProfile | None = None,
    disk_gb_s: float | None = None,
) -> list[StreamRow]:
    """Measures every case, writing rows as they come: OUTPUT.csv, OUTPUT.svg (seconds per step
    against budget), a timeline per size; at the end how the goals stand (`report_goals`).

    Rows that OUTPUT.csv holds already stay, but for those that are measured again. store: None
    measures the baselines alone;
    only: what a provider's name must contain. Returns the rows of this call, in the order in which
    they were measured: all of lowvram's before any baseline, which leaves torch's allocators in
    another state.
    """
    return_freed_memory()
    earlier, rows = read_rows(output.with_suffix(".csv"), machine_of(device.type)), []
    timelines: dict[tuple[object, ...], Timeline] = {}
    try:
        named = only in f"lowvram {FORMAT}"
        for opened, case in [(store, case) for case in cases if store is not None and named]:
            last, budgets = Timeline(), ""
            for row, timeline in lowvram_rows(opened, case, device, profile, disk_gb_s):
                rows.append(row)
                timelines[row.key] = timeline
                last, budgets = (timeline, row.budgets) if timeline.copies else (last, budgets)
                _report(output, earlier, rows)
            if last.visits:
                size = "x".join(map(str, case.size))
                picture = timeline_plot(last, f"{size} x {case.frames}, {budgets}")
                write_svg(output.with_name(f"{output.name}-timeline-{size}.svg"), picture)
        for case in cases:
            for row in baseline_rows(config, case, device, only):
                rows.append(row)
                _report(output, earlier, rows)
    finally:
        if rows:
            report_goals(output, merged(earlier, rows), timelines, rehearsal=device.type == "cpu")
    tidy(device)
    return rows


def _report(output: Path, earlier: Sequence[StreamRow], rows: Sequence[StreamRow]) -> None:
    row = rows[-1]
    took = f"{row.step_s:.3f} s per step" if row.step_s is not None else ""
    within = f" within {row.budgets}" if row.budgets else ""
    print(
        f"{row.provider} {row.size} x {row.frames}{within}: "
        f"{'; '.join(filter(None, (took, row.note)))}",
        flush=True,
    )
    everything = merged(earlier, rows)
    write_csv(output.with_suffix(".csv"), everything)
    write_svg(
        output.with_suffix(".svg"),
        bars(f"{row.gpu}, torch {row.torch}, {row.commit}", row_bars(everything)),
    )


def free_bytes(device: torch.device) -> int:
    """What lies free of the device; in a rehearsal on a CPU half of what lies free of its memory,
    as for `--vram auto`.
    """
    if device.type != "cuda":
        return host_memory().free_bytes // 2
    torch.zeros(1, device=device)
    return int(torch.cuda.mem_get_info(device)[0])


def budgets_of(options: argparse.Namespace, free_vram: int) -> list[tuple[int, int]]:
    """Everything on the device with the largest RAM budget, then every pair. Whole GB of free VRAM:
    another call gives the same.
    """
    largest = int(max(options.ram) * GB)
    return [(free_vram // GB * GB, largest)] + [
        (int(vram * GB), int(ram * GB)) for vram in options.vram for ram in options.ram
    ]


def stream(options: argparse.Namespace, output: Path) -> int:
    """The benchmark, on a CPU its rehearsal; 1 where a row of lowvram failed or left its plan,
    budgets changed the latents, or a peak exceeded its plan. A missed goal is said, and no failure.
    """
    if options.steps < 2:
        print(
            "bench stream: --steps must be at least 2, so that the expert switch is among them",
            file=sys.stderr,
        )
        return 2
    device, config, name = (
        torch.device(options.device),
        bench_config(options.layers),
        f"lowvram {FORMAT}",
    )
    only = name if options.no_baselines else options.only
    if not any(only in provider for provider in (name, *baselines(device))):
        print(
            f"bench stream: --only {only!r} is in no provider's name: "
            f"{', '.join((name, *baselines(device)))}",
            file=sys.stderr,
        )
        return 2
    free = free_bytes(device)
    budgets = budgets_of(options, free)
    cases = [
        Case(parse_size(size), options.frames, options.steps, budgets) for size in options.sizes
    ]
    if only not in name:
        rows = run(None, config, cases, device, output, only)
    else:
        folder = options.work / f"a14b-{options.layers}"
        with (
            open_store(folder)
            if (folder / "lowvram.json").exists()
            else write_random_store(folder, config) as store
        ):
            speed = disk_speed(store)
            print(
                f"random store at {folder}, disk {speed:.2f} GB/s, {format_bytes(free)} of "
                f"VRAM free"
            )
            profile = measure_profile(device.type, options.work, disk_bytes_s=speed * GB)
            rows = run(store, config, cases, device, output, only, profile, speed)
    found = problems(rows)
    for problem in found:
        print(f"bench stream: {problem}", file=sys.stderr)
    return 1 if found else 0
