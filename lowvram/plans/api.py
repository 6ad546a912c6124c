"""Memory plans and predicted times for a store or a variant, on this machine or on a card of the
table, without a GPU.

Importing this module does not import torch; functions import it where they must open a store or
ask for this machine's budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from lowvram.doctor.kernel_check import known_problems
from lowvram.doctor.measure import on_disk_of, this_machine
from lowvram.errors import BudgetError, UsageError
from lowvram.hardware.budgets import AUTO_SHARE, amount_bytes, resolve_budgets
from lowvram.hardware.cgroups import free_ram_bytes
from lowvram.hardware.profile import GIVEN, MachineProfile
from lowvram.planner.choose import choose_plan
from lowvram.planner.phases import Host
from lowvram.planner.plan import MemoryPlan
from lowvram.plans.table import Cell, Matrix
from lowvram.request import Workload, check_clip
from lowvram.timing.cards import (
    COMPUTE_CAPABILITIES,
    Card,
    card_with,
    find_card,
    parse_link,
    parse_speed,
)
from lowvram.timing.forecast import Forecast
from lowvram.units import clip_size, format_memory, shown
from lowvram.variants import VARIANTS, ModelConfig

MATRIX_SIZES = ((640, 384), (832, 480), (1280, 720))
MATRIX_FRAMES = (33, 81, 121)
MATRIX_VRAM_GIB = (24, 16, 12, 8, 6)
DEFAULT_VRAM_BYTES = 8 * 2**30


def plan(
    model: str | Path,
    *,
    size: str | tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    refine_steps: int = 0,
    vram: str | int | None = None,
    ram: str | int = "16GiB",
    format: str = "int8",
    device: str = "cuda",
    gpu: str | None = None,
    link: str | None = None,
    disk: str | None = None,
) -> MemoryPlan:
    """Compute peak memory and predicted time of a run, without a GPU.

    model: folder of a store, or a variant such as `t2v-a14b`. format: used for a variant only.
    size: (width, height) in pixels or text like `832x480`; size, frames and steps default to the
    model's; refine_steps: as in `Request`.

    vram, ram: bytes, text like `8GiB`, or `auto`. VRAM `auto` is a share of the card's memory with
    `gpu`, else the budget and device that a run on this machine would get. VRAM None is `auto` with
    `gpu`, else 8 GiB or all of a measured machine that has less. RAM `auto` is a share of the RAM
    free on this machine.
    device: cuda or cpu.

    gpu: a card of the table. Without one, times are predicted for this machine if `lowvram doctor`
    has measured it, and not at all otherwise. link: such as "PCIe 4.0 x8", or bytes per second such
    as "12GB"; disk: bytes per second such as "3.5GB". Both replace a speed of the prediction.

    Raises `BudgetError` that names the smallest sufficient budgets, or the memory of a card with
    less VRAM than requested, and `UsageError` for an unknown model or card, an invalid setting, or
    `link` and `disk` without a prediction.
    """
    config, format = describe(model, format)
    pixels = None if size is None else clip_size(size)
    workload = Workload.of(config, format, pixels, frames, steps, refine_steps)
    device, vram_bytes, ram_bytes = _budgets(vram, ram, gpu, device)
    machine = planned_machine(model, gpu, link, disk, ram_bytes, device)
    if machine is None and (link or disk):
        raise UsageError(
            "a link or a disk changes predicted times, and no times are predicted: name a card "
            "with --gpu, or run `lowvram doctor`"
        )
    if machine is None:
        vram_bytes = vram_bytes or DEFAULT_VRAM_BYTES
    elif vram_bytes is None:
        vram_bytes = (
            _auto_vram_bytes(machine) if gpu else min(DEFAULT_VRAM_BYTES, machine.vram_total_bytes)
        )
    elif vram != "auto":
        _check_vram(machine, vram_bytes)
    return _choose(workload, _host(device, gpu, machine, format), vram_bytes, ram_bytes, machine)


def plan_matrix(
    model: str | Path,
    *,
    frames: int | None = None,
    steps: int | None = None,
    refine_steps: int = 0,
    vram: str | int | None = None,
    ram: str | int = "16GiB",
    format: str = "int8",
    gpu: str | None = None,
    link: str | None = None,
    disk: str | None = None,
    sizes: Sequence[tuple[int, int]] = MATRIX_SIZES,
) -> Matrix:
    """Compute `plan` for every size, number of frames and VRAM budget.

    frames: one number instead of `MATRIX_FRAMES`. vram: one budget; by default a share of the
    memory of `gpu`, or those of `MATRIX_VRAM_GIB` that the machine has. sizes: (width, height) in
    pixels. Other arguments as in `plan`.

    Without `gpu` and without a measured machine, the card is `cards.card_with` the VRAM budget. A
    combination that does not fit gives a cell without a plan. Raises `UsageError`, and
    `BudgetError` if the card or the machine has less VRAM than `vram`.
    """
    config, format = describe(model, format)
    lengths: Sequence[int] = MATRIX_FRAMES if frames is None else [frames]
    steps = config.sampling.steps if steps is None else steps
    for (width, height), length in product(map(clip_size, sizes), lengths):
        check_clip(width, height, length, steps)
    device, vram_bytes, ram_bytes = _budgets(vram, ram, gpu, "cuda")
    machine = planned_machine(model, gpu, link, disk, ram_bytes, device)
    host = _host(machine.device if machine else "cuda", gpu, machine, format)
    if machine is None:
        machine = _card_profile(card_with(vram_bytes or 0), link, disk, ram_bytes)
        # `auto` without a GPU is a share of this machine's RAM, which may exceed any card's VRAM.
        if vram == "auto" and vram_bytes is not None:
            vram_bytes = min(vram_bytes, machine.vram_total_bytes)
    if vram_bytes is not None:
        budgets = [vram_bytes]
        if vram != "auto":
            _check_vram(machine, vram_bytes)
    else:
        listed = [] if gpu else [gibibytes * 2**30 for gibibytes in MATRIX_VRAM_GIB]
        budgets = [budget for budget in listed if budget <= machine.vram_total_bytes] or [
            _auto_vram_bytes(machine)
        ]
    cells = []
    for (width, height), length, budget in product(sizes, lengths, budgets):
        single, refusal = None, ""
        try:
            workload = Workload.of(config, format, (width, height), length, steps, refine_steps)
            single = _choose(workload, host, budget, ram_bytes, machine)
        except BudgetError as error:
            refusal = str(error)
        cells.append(Cell(width, height, length, budget, single, refusal))
    return Matrix(config.variant, format, machine.name, machine.basis, ram_bytes, tuple(cells))


def planned_machine(
    model: str | Path,
    gpu: str | None,
    link: str | None,
    disk: str | None,
    ram_bytes: int,
    device: str,
) -> MachineProfile | None:
    """Speeds for the prediction: those of card `gpu`, else this machine's profile, else None.

    link, disk: replace the speed of the link and the disk; None keeps it. ram_bytes: RAM of a
    machine with the card. device: cuda or cpu. A measured disk speed is used for variants and for
    stores on that disk; a store on another disk gets the speed of the table of cards. Raises
    `UsageError` for an unknown card or speed.
    """
    if gpu is not None:
        return _card_profile(find_card(gpu), link, disk, ram_bytes)
    link_bytes_s, disk_bytes_s = _speeds(link, disk)
    here = this_machine(device)
    if here is None:
        return None
    if disk_bytes_s is None and str(model) not in VARIANTS:
        here = on_disk_of(Path(model), here)
    given = {
        name: GIVEN
        for name, speed in (("link_bytes_s", link_bytes_s), ("disk_bytes_s", disk_bytes_s))
        if speed
    }
    return replace(
        here,
        link_bytes_s=link_bytes_s or here.link_bytes_s,
        disk_bytes_s=disk_bytes_s or here.disk_bytes_s,
        sources={**here.sources, **given},
    )


def _card_profile(card: Card, link: str | None, disk: str | None, ram_bytes: int) -> MachineProfile:
    return card.profile(ram_bytes, *_speeds(link, disk))


def _speeds(link: str | None, disk: str | None) -> tuple[float | None, float | None]:
    """Bytes per second of both; None for one that is not given."""
    return parse_link(link) if link else None, parse_speed(disk) if disk else None


def _choose(
    workload: Workload,
    host: Host,
    vram_bytes: int,
    ram_bytes: int,
    machine: MachineProfile | None,
) -> MemoryPlan:
    if machine is None:
        return choose_plan(workload, host, vram_bytes, ram_bytes)
    clock, limit = Forecast(workload, machine), machine.pinned_limit_bytes
    return choose_plan(workload, host, vram_bytes, ram_bytes, clock, limit)


def _host(device: str, gpu: str | None, machine: MachineProfile | None, format: str) -> Host:
    """The planner's `Host`. On this machine (no `gpu`), failed kernel checks add the temporaries of
    the reference implementations.
    """
    card = COMPUTE_CAPABILITIES.get(find_card(gpu).architecture, "") if gpu else ""
    host = Host.of(device, architecture=card)
    if device != "cuda" or gpu is not None or machine is None:
        return host
    import torch

    from lowvram.models.numerics import stored_values

    here = torch.device(device)
    references = host.references or bool(known_problems(here))
    return replace(host, references=references, values=stored_values(format, here))


def _budgets(
    vram: str | int | None, ram: str | int, gpu: str | None, device: str
) -> tuple[str, int | None, int]:
    """Resolve (device, VRAM bytes, RAM bytes); VRAM None leaves the default to the caller.

    Loads torch only for `auto` VRAM without a card. Raises `UsageError`.
    """
    if device not in ("cuda", "cpu"):
        raise UsageError(f"cannot plan for device {shown(device)}: use cuda or cpu")
    if vram == "auto" and gpu is None:
        here = resolve_budgets("auto", "auto", "cpu" if device == "cpu" else "auto")
        return (
            here.device,
            here.vram_bytes,
            here.ram_bytes if ram == "auto" else amount_bytes("RAM", ram),
        )
    ram_bytes = int(free_ram_bytes() * AUTO_SHARE) if ram == "auto" else amount_bytes("RAM", ram)
    return device, None if vram is None or vram == "auto" else amount_bytes("VRAM", vram), ram_bytes


def _auto_vram_bytes(machine: MachineProfile) -> int:
    return int(machine.vram_total_bytes * AUTO_SHARE)


def _check_vram(machine: MachineProfile, vram_bytes: int) -> None:
    """Raise `BudgetError` if the machine has less VRAM than the budget."""
    if vram_bytes > machine.vram_total_bytes:
        wanted, total = format_memory(vram_bytes), format_memory(machine.vram_total_bytes)
        raise BudgetError(
            f"VRAM of {wanted} was asked for, {machine.name} has {total}: ask for less or for "
            f"auto, or name another --gpu"
        )


def describe(model: str | Path, format: str) -> tuple[ModelConfig, str]:
    """Return (configuration, format) of a variant by name, or of a store on disk.

    Raises `UsageError` for an unknown model, `CheckpointError` for a damaged store.
    """
    if str(model) in VARIANTS:
        return VARIANTS[str(model)].config, format
    if not Path(model).exists():
        raise UsageError(
            f"{model} is neither a folder nor a variant: use {', '.join(VARIANTS)}, or the "
            f"folder of a quantized model"
        )
    from lowvram.store.reader import open_store  # imports torch

    with open_store(Path(model)) as store:
        return store.config, store.format
