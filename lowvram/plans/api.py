"""Plans without a run and without torch: `lowvram plan` for a store or a variant, on this machine
or on a card of the table.
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
from lowvram.timing.cards import Card, card_with, find_card, parse_link, parse_speed
from lowvram.timing.forecast import Forecast
from lowvram.units import clip_size, format_bytes, shown
from lowvram.variants import VARIANTS, ModelConfig

MATRIX_SIZES = ((640, 384), (832, 480), (1280, 720))
MATRIX_FRAMES = (33, 81, 121)
MATRIX_VRAM_GB = (24, 16, 12, 8, 6)
DEFAULT_VRAM_BYTES = 8 * 2**30


def plan(
    model: str | Path,
    *,
    size: str | tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    vram: str | int | None = None,
    ram: str | int = "16GiB",
    format: str = "int8",
    device: str = "cuda",
    gpu: str | None = None,
    link: str | None = None,
    disk: str | None = None,
) -> MemoryPlan:
    """Peak memory of a run and its predicted time, computed without a GPU. model: a store, or a
    variant such as `t2v-a14b` (then `format` counts). vram: by default what `auto` would take of
    the card, or 8 GiB (or all that this machine has) where none is named.

    vram, ram: bytes, text like `8GiB`, or `auto`: of VRAM a share of `gpu`, else what a run on this
    machine would take, on the device that it would take; of RAM a share of what is free here.
    device: cuda or cpu.

    gpu: a card of the table; without one the prediction is of this machine, if `lowvram doctor`
    measured it, else there is none. link: such as "PCIe 4.0 x8" or "12GB" a second; disk: bytes a
    second such as "3.5GB"; both only where there is a prediction to change.

    Raises `BudgetError` naming the smallest budgets that would do, or the memory of a card that has
    less VRAM than was asked for, `UsageError` for an unknown model or card and for what no run
    takes.
    """
    config, format = describe(model, format)
    pixels = None if size is None else clip_size(size)
    workload = Workload.of(config, format, pixels, frames, steps)
    device, vram_bytes, ram_bytes = _budgets(vram, ram, gpu, device)
    machine = planned_machine(model, gpu, link, disk, ram_bytes, device)
    if machine is None and (link or disk):
        raise UsageError(
            "a link or a disk changes predicted times, and there are none: name a card with "
            "--gpu, or run `lowvram doctor`"
        )
    if machine is None:
        vram_bytes = vram_bytes or DEFAULT_VRAM_BYTES
    elif vram_bytes is None:
        vram_bytes = (
            _share_of(machine) if gpu else min(DEFAULT_VRAM_BYTES, machine.vram_total_bytes)
        )
    elif vram != "auto":
        _check_vram(machine, vram_bytes)
    return _choose(workload, _host(device, gpu, machine), vram_bytes, ram_bytes, machine)


def plan_matrix(
    model: str | Path,
    *,
    frames: int | None = None,
    steps: int | None = None,
    vram: str | int | None = None,
    ram: str | int = "16GiB",
    format: str = "int8",
    gpu: str | None = None,
    link: str | None = None,
    disk: str | None = None,
    sizes: Sequence[tuple[int, int]] = MATRIX_SIZES,
) -> Matrix:
    """`plan` over sizes and lengths (or `frames` alone) against VRAM budgets: `vram`, else what the
    card has, else those of 24 to 6 GB that this machine has.

    Without a card and without a measured machine the plans and times are those of `cards.card_with`
    the VRAM. Raises `UsageError`, and `BudgetError` where the card or the machine has less than
    `vram`; what does not fit is a cell without a plan.
    """
    config, format = describe(model, format)
    lengths: Sequence[int] = MATRIX_FRAMES if frames is None else [frames]
    steps = config.sampling.steps if steps is None else steps
    for (width, height), length in product(map(clip_size, sizes), lengths):
        check_clip(width, height, length, steps)
    device, vram_bytes, ram_bytes = _budgets(vram, ram, gpu, "cuda")
    machine = planned_machine(model, gpu, link, disk, ram_bytes, device)
    host = _host(machine.device if machine else "cuda", gpu, machine)
    if machine is None:
        machine = _card_profile(card_with(vram_bytes or 0), link, disk, ram_bytes)
        # of this machine, which may be a host with more memory than any card
        if vram == "auto" and vram_bytes is not None:
            vram_bytes = min(vram_bytes, machine.vram_total_bytes)
    if vram_bytes is not None:
        budgets = [vram_bytes]
        if vram != "auto":
            _check_vram(machine, vram_bytes)
    else:
        listed = [] if gpu else [gigabytes * 10**9 for gigabytes in MATRIX_VRAM_GB]
        budgets = [budget for budget in listed if budget <= machine.vram_total_bytes] or [
            _share_of(machine)
        ]
    cells = []
    for (width, height), length, budget in product(sizes, lengths, budgets):
        made, refusal = None, ""
        try:
            workload = Workload.of(config, format, (width, height), length, steps)
            made = _choose(workload, host, budget, ram_bytes, machine)
        except BudgetError as error:
            refusal = str(error)
        cells.append(Cell(width, height, length, budget, made, refusal))
    return Matrix(config.variant, format, machine.name, machine.basis, ram_bytes, tuple(cells))


def planned_machine(
    model: str | Path,
    gpu: str | None,
    link: str | None,
    disk: str | None,
    ram_bytes: int,
    device: str,
) -> MachineProfile | None:
    """The card of the table, else what `lowvram doctor` measured here, else None; link and disk
    replace what either says.

    A measured disk counts for a store on that disk alone, and for a variant.
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
    """Bytes per second of both, None where they are not named."""
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


def _host(device: str, gpu: str | None, machine: MachineProfile | None) -> Host:
    """The references' temporaries count, too, where the machine is this one and a check of its
    kernels is known to have failed.
    """
    host = Host.of(device)
    if device != "cuda" or gpu is not None or machine is None:
        return host
    import torch

    return replace(host, references=host.references or bool(known_problems(torch.device(device))))


def _budgets(
    vram: str | int | None, ram: str | int, gpu: str | None, device: str
) -> tuple[str, int | None, int]:
    """(device, VRAM, RAM); VRAM None is for the caller to choose. Torch is loaded only by `auto`
    VRAM without a card.
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


def _share_of(machine: MachineProfile) -> int:
    return int(machine.vram_total_bytes * AUTO_SHARE)


def _check_vram(machine: MachineProfile, vram_bytes: int) -> None:
    """Raises `BudgetError` where a run on the machine would: a budget is no more than what there
    is.
    """
    if vram_bytes > machine.vram_total_bytes:
        wanted, has = format_bytes(vram_bytes), format_bytes(machine.vram_total_bytes)
        raise BudgetError(
            f"VRAM of {wanted} was asked for, {machine.name} has {has}: ask for less or for "
            f"auto, or name another --gpu"
        )


def describe(model: str | Path, format: str) -> tuple[ModelConfig, str]:
    """(configuration, format) of a variant's name or of a store on disk."""
    if str(model) in VARIANTS:
        return VARIANTS[str(model)].config, format
    if not Path(model).exists():
        raise UsageError(
            f"{model} is neither a folder nor a variant: use {', '.join(VARIANTS)} or the "
            f"folder of a quantized model"
        )
    from lowvram.store.reader import open_store  # loads torch

    with open_store(Path(model)) as store:
        return store.config, store.format
