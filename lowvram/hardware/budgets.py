"""What the user's `--vram` and `--ram` mean on this machine, in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil

from lowvram.errors import BudgetError, UsageError
from lowvram.units import format_bytes, parse_bytes, shown

# What `auto` leaves to other programs.
AUTO_SHARE = 0.85
# What importing libraries and small tensors add to the process after the budgets are fixed.
PROCESS_GROWTH_BYTES = 400 * 10**6


@dataclass(frozen=True)
class Budgets:
    """A device and what may be used of it and of host RAM.

    process_bytes: of the RAM, lowvram's own code and libraries; context_bytes: of the device, what
    driver and libraries were measured to take, None where they were not.
    """

    device: str
    vram_bytes: int
    ram_bytes: int
    process_bytes: int
    context_bytes: int | None = None


def resolve_budgets(vram: str | int, ram: str | int, device: str) -> Budgets:
    """`auto` takes a share of what is free now; on a CPU half of that share is the workspace's
    ("VRAM") and half the RAM's.

    Raises `UsageError` for text that is no amount or no device, `BudgetError` where the machine has
    less than was asked for.
    """
    name = _device(device)
    context = _context(name)  # before anything else touches the device
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
    """Bytes of a budget that is not `auto`; label: VRAM or RAM. Raises `UsageError` for what is no
    positive amount.
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
        wanted, has = format_bytes(nbytes), format_bytes(total)
        raise BudgetError(
            f"{label} of {wanted} was asked for, this machine has {has}: ask for less or for auto"
        )
    return nbytes


def _device(name: str) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", name):
        raise UsageError(f"unknown device {shown(name)}: here are {_devices(count)}")
    if name.startswith("cuda") and not count:
        raise UsageError(
            f"device {name} was asked for, but torch sees no GPU: use auto or cpu, or run "
            f"`lowvram doctor`"
        )
    if name.startswith("cuda:") and int(name.removeprefix("cuda:")) >= count:
        raise UsageError(f"there is no device {name}: here are {_devices(count)}")
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
