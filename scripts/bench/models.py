"""Whole parts of a model in `bench all`: one block, denoising steps within budgets, and the demo
from checkpoint to frames.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from lowvram.errors import BudgetError
from lowvram.planner.phases import PlanChoice
from lowvram.planner.plan import describe_plan
from lowvram.request import latent_shape
from lowvram.variants import T2V_A14B, ModelConfig, TextEncoderConfig, VAEConfig
from scripts.bench.steps import Context, LeftOut, Row, Unit

if TYPE_CHECKING:  # these need packages that a step on a bare machine does without
    from lowvram.pipeline import Pipeline, Video
    from lowvram.store.reader import Store

GB = 10**9
SIZE, FRAMES, STEPS = (832, 480), 81, 4
LAYERS = 16  # of each expert, 11 GB of random weights in all: 6 GB of VRAM hold 7 of them
SMALL_VRAM = 6 * GB
PROMPT = "a red circle moves right on a white background"
MEMORY_TESTS = "tests/gpu/test_memory.py"


def toy_config(layers: int = 2) -> ModelConfig:
    """What a rehearsal takes in the place of A14B."""
    dit = replace(
        T2V_A14B.dit,
        dim=256,
        ffn_dim=512,
        num_heads=2,
        num_layers=layers,
        text_dim=256,
        text_len=32,
    )
    text = TextEncoderConfig(
        vocab_size=256, d_model=256, num_heads=4, head_dim=64, d_ff=256, num_layers=1
    )
    return ModelConfig(
        "t2v-custom", dit, text, VAEConfig(base_dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
    )


def block_units(context: Context) -> Iterator[Unit]:
    yield Unit("block", lambda: block(context))


def block(context: Context) -> Iterator[Row]:
    """diffusers' block in bf16, then lowvram's in each format, then with each product of
    attention.
    """
    from lowvram_kernels.tuning import INTERPRETER, architecture, pv_choices

    from scripts.bench.block import results

    if context.rehearse:
        found = results(
            toy_config(), (1, 2, 4), ("int8", "fp8"), "cpu", pv_choices(INTERPRETER)[:2]
        )
    else:
        grid = latent_shape(T2V_A14B, *SIZE, FRAMES).grid
        found = results(
            T2V_A14B,
            grid,
            ("int8", "int8-plain", "fp8"),
            "cuda",
            pv_choices(architecture(torch.device("cuda"))),
        )
    for row in found:
        yield without_machine(row)
        context.require_time()


def without_machine(row: Any) -> Row:
    """A row of another benchmark as a dictionary, less what all rows of this one carry."""
    return {
        key: value for key, value in asdict(row).items() if key not in ("gpu", "torch", "commit")
    }


def stream_units(context: Context) -> Iterator[Unit]:
    """lowvram within three pairs of budgets, then what people use today, then the tests of
    memory.
    """
    yield Unit("lowvram", lambda: streamed(context))
    for name in ("bf16 resident", "bf16 group offloading", "optimum-quanto"):
        yield Unit(f"diffusers {name}", partial(beside, name, context), ("diffusers", "optimum"))
    yield Unit(
        "tests of memory",
        lambda: memory_tests(context),
        ("pytest", "av", "ftfy", "tokenizers", "diffusers", "optimum"),
    )


def stream_case(context: Context) -> tuple[ModelConfig, Any]:
    from scripts.bench.random_store import bench_config
    from scripts.bench.stream import Case

    if context.rehearse:
        return toy_config(40), Case((64, 64), 9, 4, ())
    return bench_config(LAYERS), Case(SIZE, FRAMES, STEPS, ())


def streamed(context: Context) -> Iterator[Row]:
    """A row per pair of budgets: everything resident, `SMALL_VRAM` with much RAM, and with as
    little RAM as a plan takes, from disk.
    """
    from lowvram.doctor.measure import measure_profile
    from lowvram.hardware.cgroups import host_memory
    from scripts.bench.random_store import write_random_store
    from scripts.bench.stream import disk_speed, free_bytes, lowvram_rows
    from scripts.bench.stream_rows import problems

    config, case = stream_case(context)
    device = torch.device(context.device)
    begin = time.perf_counter()
    with write_random_store(context.work / "store", config) as store:
        yield {"name": "random store", "seconds": round(time.perf_counter() - begin, 2)}
        speed = disk_speed(store)
        profile = measure_profile(device.type, context.work, disk_bytes_s=speed * GB)
        much = int(host_memory().free_bytes * 0.8)
        free = free_bytes(device)
        small = SMALL_VRAM if not context.rehearse else smallest(store, case, device, "vram", much)
        little = smallest(store, case, device, "ram", small)
        case = replace(case, budgets=((free // GB * GB, much), (small, much), (small, little)))
        rows = []
        for row, _ in lowvram_rows(store, case, device, profile, speed):
            rows.append(row)
            yield without_machine(row)
            context.require_time()
    wrong = problems(rows)
    if wrong:
        raise BudgetBrokenError("; ".join(wrong))


class BudgetBrokenError(Exception):
    """A run failed, left its plan, took more than planned, or budgets changed the latents."""


def smallest(store: Store, case: Any, device: torch.device, which: str, other: int) -> int:
    """The smallest budget of VRAM or RAM, in bytes, that a plan takes beside the other one. Raises
    `LeftOut` where none does.
    """
    import psutil

    from lowvram.hardware.budgets import PROCESS_GROWTH_BYTES
    from lowvram.planner.phases import Host
    from scripts.bench.stream import BenchPipeline, request_of, taken_bytes

    process = psutil.Process().memory_info().rss + PROCESS_GROWTH_BYTES
    host = Host(True, taken_bytes(device), process, Host.of(device.type).references)
    begin, step = (0, GB // 500) if which == "vram" else (process, GB // 4)

    def fits(amount: int) -> bool:
        vram, ram = (amount, other) if which == "vram" else (other, amount)
        pipeline = BenchPipeline(store, device, vram, ram, host)
        try:
            pipeline.plan(request_of(pipeline, case.size, case.frames, case.steps))
        except BudgetError:
            return False
        return True

    found = next(
        (amount for amount in range(begin + step, begin + 400 * step, step) if fits(amount)), None
    )
    if found is None:
        raise LeftOut(f"no plan within any budget of {which.upper()}")
    # the process grows between one row and the next
    return found + (GB // 4 if which == "ram" else 0)


def beside(name: str, context: Context) -> Iterator[Row]:
    from scripts.bench.stream import baseline_rows

    config, case = stream_case(context)
    for row in baseline_rows(config, case, torch.device(context.device), name):
        if not row.note or row.step_s is not None:
            yield without_machine(row)
        elif context.rehearse:
            raise LeftOut(row.note.removeprefix("not measured: "))
        else:
            raise RuntimeError(row.note)


def memory_tests(context: Context) -> Iterator[Row]:
    from scripts.bench.correct import tested

    yield from tested(MEMORY_TESTS, "1/1", context)


def demo_units(context: Context) -> Iterator[Unit]:
    yield Unit("demo", lambda: demo(context))


def demo(context: Context) -> Iterator[Row]:
    """A row per budget; the first clip lies beside the rows where av is installed."""
    from lowvram_quantize.convert import quantize

    from lowvram.demo.run import MODEL
    from lowvram.pipeline import load

    begin = time.perf_counter()
    folder = context.work / "demo"
    quantize(MODEL, folder, "int8")
    yield {"name": "quantized", "seconds": round(time.perf_counter() - begin, 2)}
    settings: dict[str, Any] = {"steps": 2, "frames": 5} if context.rehearse else {}
    pipeline = load(folder, device=context.device, prompt_cache=False)
    with pipeline.store:
        for name, choice in demo_choices(pipeline.store.config.dit.num_layers).items():
            context.require_time()
            row, video = demo_clip(pipeline, choice, settings)
            if name == "resident" and find_spec("av"):
                video.save(context.folder / "demo.mp4", overwrite=True, scale=4)
            yield {"name": name, **row}


def demo_choices(layers: int) -> dict[str, PlanChoice]:
    """Decoding takes more than denoising of so small a model: a budget alone would leave everything
    resident, so plans are chosen here.
    """
    return {
        "resident": PlanChoice(64, 0, layers, 0, True),
        "two slots, from RAM": PlanChoice(64, 2, 0, layers, False),
        "one slot, from disk": PlanChoice(64, 1, 0, 0, False),
    }


def demo_clip(
    pipeline: Pipeline, choice: PlanChoice, settings: dict[str, Any]
) -> tuple[Row, Video]:
    """One clip within exactly what the plan of `choice` takes, and its row."""
    from lowvram.demo.checker import matches
    from lowvram.demo.scenes import Scene

    request = pipeline.request(PROMPT, **settings)
    plan = describe_plan(pipeline.workload(request), choice, pipeline.host)
    pipeline.vram_bytes = plan.peak_vram_bytes
    begin = time.perf_counter()
    video = pipeline.generate(request, plan=plan)
    seconds = time.perf_counter() - begin
    shows = matches(video.frames, Scene((("red", "circle"),), "white", "right"))
    row = {
        "vram_budget_gb": plan.peak_vram_bytes / GB,
        "resident": plan.choice.resident_blocks,
        "chunk": plan.choice.chunk_tokens,
        "seconds": round(seconds, 2),
        "shows_its_prompt": bool(shows),
        "frames_sha256": hashlib.sha256(video.frames.contiguous().numpy().tobytes()).hexdigest(),
    }
    return row, video
