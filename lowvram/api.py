"""The Python interface: `lowvram.load`, `lowvram.quantize`, `lowvram.plan`."""

from __future__ import annotations

from pathlib import Path

from lowvram_quantize.convert import quantize

from lowvram.checkpoint.store import open_store
from lowvram.config import VARIANTS, ModelConfig, parse_bytes, parse_size
from lowvram.errors import UsageError
from lowvram.memory.plan import Host, MemoryPlan, choose_plan
from lowvram.pipeline import Pipeline, Video, load

__all__ = ["Pipeline", "Video", "load", "plan", "quantize"]


def plan(
    model: str | Path,
    *,
    size: str | None = None,
    frames: int | None = None,
    steps: int | None = None,
    vram: str | int = "8GiB",
    ram: str | int = "16GiB",
    format: str = "int8",
    device: str = "cuda",
) -> MemoryPlan:
    """Peak memory of a run, computed without a GPU. model: a store, or a variant such as `t2v-a14b` (then `format` counts).

    Raises `BudgetError` naming the smallest budgets that would do, `UsageError` for an unknown model.
    """
    config, format = describe(model, format)
    defaults = config.sampling
    wanted = parse_size(size) if size else (defaults.width, defaults.height)
    vram_bytes, ram_bytes = (amount if isinstance(amount, int) else parse_bytes(amount) for amount in (vram, ram))
    lengths = frames or defaults.num_frames, steps or defaults.steps
    return choose_plan(config, format, wanted, *lengths, Host.of(device), vram_bytes, ram_bytes)


def describe(model: str | Path, format: str) -> tuple[ModelConfig, str]:
    """(configuration, format) of a variant's name or of a store on disk."""
    if str(model) in VARIANTS:
        return VARIANTS[str(model)], format
    if not Path(model).exists():
        raise UsageError(f"{model} is neither a folder nor a variant: use {', '.join(VARIANTS)} or the folder of a quantized model")
    with open_store(Path(model)) as store:
        return store.config, store.format
