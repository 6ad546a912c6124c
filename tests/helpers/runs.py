"""Pieces of a run that tests put together by hand: stores of tiny models, one expert's velocity,
chosen memory plans.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from lowvram_quantize.convert import quantize

from lowvram.memory.arena import Arena, Ledger
from lowvram.models.wan import WanTransformer, condition, load_embeddings_and_head
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import MemoryPlan, describe_plan
from lowvram.request import Request, Workload
from lowvram.store.reader import Store, open_store
from lowvram.streaming.stream import Buffers, open_stream
from lowvram.streaming.transport import make_transport
from lowvram.variants import ModelConfig
from tests.helpers.checkpoints import write_official

CPU = torch.device("cpu")
SMALL = {"width": 64, "height": 64, "num_frames": 9}


def make_store(folder: Path, config: ModelConfig, format: str, seed: int = 0) -> Store:
    """A quantized tiny model, opened; made once per folder."""
    if not (folder / format).exists():
        source = folder / "source"
        if not source.exists():
            write_official(source, config, seed)
        quantize(source, folder / format, format)
    return open_store(folder / format)


def pipeline_of(store: Store) -> Pipeline:
    return Pipeline(store, CPU, 4 * 2**30, 8 * 2**30, 10**9)


def request_of(pipeline: Pipeline, prompt: str = "a red circle", **changes: object) -> Request:
    return pipeline.request(prompt, **({"steps": 3} | SMALL | changes))


def plan_of(pipeline: Pipeline, request: Request, choice: PlanChoice) -> MemoryPlan:
    return describe_plan(pipeline.workload(request), choice, pipeline.host)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@torch.no_grad()
def expert_velocities(
    store: Store,
    expert: str,
    size: tuple[int, int],
    frames: int,
    latents: torch.Tensor,
    timestep: int,
    features: list[torch.Tensor],
    choice: PlanChoice,
) -> list[torch.Tensor]:
    """One forward of one expert for each branch's text features."""
    config = store.config
    plan = describe_plan(Workload.of(config, store.format, size, frames, 1), choice, Host.of("cpu"))
    ledger = Ledger("VRAM", plan.peak_vram_bytes)
    file = store.files[expert]
    conditioning = condition(
        file.read, config.dit, store.format, torch.tensor([timestep]), features, CPU
    )
    rounds = 1 if choice.joint_guidance else len(features)
    schedule = [(expert, index) for _ in range(rounds) for index in range(config.dit.num_layers)]
    buffers = Buffers(
        plan.slot_bytes, choice.resident_blocks, choice.ring_slots, choice.host_blocks, 0
    )
    with open_stream(
        store.files,
        schedule,
        buffers,
        ledger,
        Ledger("RAM", plan.peak_ram_bytes),
        CPU,
        make_transport(CPU),
    ) as streamer:
        model = WanTransformer(plan.workload, choice, Arena(plan.workspace, ledger, CPU), CPU)
        return model.velocities(
            latents,
            0,
            conditioning,
            load_embeddings_and_head(file.read, store.format, CPU),
            streamer,
            expert,
        )
