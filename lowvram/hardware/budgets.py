"""Resolve `--vram`, `--ram` and `--device` to a device and budgets in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil

from lowvram.errors import BudgetError, UsageError
from lowvram.hardware.cgroups import host_memory
from lowvram.units import format_memory, parse_bytes, shown

# Share of the free memory that `auto` takes; the remainder is for other programs.
AUTO_SHARE = 0.85
# Growth of the process after the budgets are fixed: imported libraries and small tensors.
PROCESS_GROWTH_BYTES = 400 * 10**6
# What torch and the libraries take before a run begins: 0.35 GB measured.
SMALLEST_FREE_BYTES = 500 * 10**6


@dataclass(frozen=True)
class Budgets:
    """A device and the memory that a run may use on it and on the host.

    process_bytes: part of the RAM that code and libraries of the process take.
    context_bytes: measured device memory of driver and libraries, None if not measured.
    """

    device: str
    vram_bytes: int
    ram_bytes: int
    process_bytes: int
    context_bytes: int | None = None


def check_budgets(vram: str | int, ram: str | int) -> None:
    """Check two budgets as far as that needs no torch, whose import takes seconds and memory.

    Raises `UsageError` for an invalid amount, `BudgetError` for more RAM than there is and for a
    control group that is too small for any run.
    """
    memory = host_memory()
    if vram != "auto":
        amount_bytes("VRAM", vram)
    _amount("RAM", ram, 0, memory.total_bytes)
    if memory.free_bytes < SMALLEST_FREE_BYTES:
        limit = "" if memory.limited_by == "machine" else f", by its {memory.limited_by}"
        raise BudgetError(
            f"this process may take {format_memory(memory.free_bytes)} of memory{limit}, and "
            f"libraries alone take {format_memory(SMALLEST_FREE_BYTES)}: close other programs, or "
            f"give the container more memory"
        )


def resolve_budgets(vram: str | int, ram: str | int, device: str) -> Budgets:
    """Resolve a device and two budgets, each an amount or `auto`.

    `auto` takes `AUTO_SHARE` of the free memory; on a CPU one half of that is the "VRAM" budget
    (the workspace) and the other the RAM budget.
    Raises `UsageError` for an invalid amount or device, `BudgetError` for more than there is.
    """
    name = _device(device)
    context = _context(name)  # before anything else uses the device
    process = psutil.Process().memory_info().rss + PROCESS_GROWTH_BYTES
    free_ram = _free_ram()
    free_vram, total_vram = _vram(name, free_ram)
    if name == "cpu":
        auto_vram, auto_ram = (
            int(free_ram * AUTO_SHARE / 2),
            int(free_ram * AUTO_SHARE / 2) + process,
        )
    else:
        auto_vram, auto_ram = int(free_vram * AUTO_SHARE), int(free_ram * AUTO_SHARE) + process
    vram_bytes = _amount("VRAM", vram, auto_vram, total_vram)
    ram_bytes = _amount("RAM", ram, auto_ram, _total_ram())
    return Budgets(name, vram_bytes, ram_bytes, process, context)


def amount_bytes(label: str, amount: str | int) -> int:
    """Parse a budget other than `auto` into bytes.

    label: `VRAM` or `RAM`, for the message. Raises `UsageError` unless the amount is positive.
    """
    nbytes = parse_bytes(amount) if isinstance(amount, str) else amount
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or not 0 < nbytes < 2**63:
        raise UsageError(
            f"the {label} budget is {shown(amount)}: expected a positive number of bytes, "
            f"text like 8GiB, or auto"
        )
    return nbytes


def _amount(label: str, wanted: str | int, automatic: int, total: int) -> int:
    if wanted == "auto":
        return automatic
    nbytes = amount_bytes(label, wanted)
    if nbytes > total:
        wanted, has = format_memory(nbytes), format_memory(total)
        raise BudgetError(
            f"the {label} budget is {wanted}, but this machine has {has}: use less, or auto"
        )
    return nbytes


def _device(name: str) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", name):
        raise UsageError(f"unknown device {shown(name)}: available are {_devices(count)}")
    if name.startswith("cuda") and not count:
        raise UsageError(
            f"device {name}: torch finds no GPU: use auto or cpu, or run `lowvram doctor`"
        )
    if name.startswith("cuda:") and int(name.removeprefix("cuda:")) >= count:
        raise UsageError(f"there is no device {name}: available are {_devices(count)}")
    if name == "auto":
        return "cuda" if count else "cpu"
    return name


def _context(device: str) -> int | None:
    if device == "cpu":
        return None
    from lowvram.hardware.machine import context_bytes

    return context_bytes(device)


def _devices(count: int) -> str:
    import torch

    return ", ".join(
        [
            "auto",
            "cpu",
            *(f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(count)),
        ]
    )


def _vram(device: str, free_ram: int) -> tuple[int, int]:
    if device == "cpu":
        return free_ram, _total_ram()
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(device))
    return free, total


def _free_ram() -> int:
    from lowvram.hardware.cgroups import free_ram_bytes

    return free_ram_bytes()


def _total_ram() -> int:
    from lowvram.hardware.cgroups import total_ram_bytes

    return total_ram_bytes()
