"""Host memory and processors that this process may use: the machine's, less what a container or
service manager keeps from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HostMemory:
    total_bytes: int
    free_bytes: int
    limited_by: str  # "machine", or the control group that allows less


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The smallest of the machine's memory and every control group's limit around this process
    (cgroup v1 and v2).
    """
    machine = psutil.virtual_memory()
    total, free, limited_by = int(machine.total), int(machine.available), "machine"
    for folder, version in _memory_groups(root):
        limit = _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        if limit is None or limit >= machine.total:
            continue
        used = (
            _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
        )
        free = min(free, max(0, limit - max(0, used - _reclaimable(folder, version))))
        if limit < total:
            total, limited_by = limit, f"cgroup v{version}"
    return HostMemory(total, free, limited_by)


def free_ram_bytes() -> int:
    """Host memory that this process can still have, within the limits of its control groups."""
    return host_memory().free_bytes


def total_ram_bytes() -> int:
    """Host memory of the machine, or what this process' control groups allow of it."""
    return host_memory().total_bytes


def cpu_count(root: Path = Path("/")) -> int:
    """Processors this process may run on, no more than its control group's quota gives it, at least
    1.
    """
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for quota, period in _cpu_quotas(root):
        count = min(count, max(1, quota // period))
    return max(1, count)


def _memory_groups(root: Path) -> list[tuple[Path, int]]:
    return [*_groups(root, "memory", 1), *_groups(root, "", 2)]


def _groups(root: Path, controller: str, version: int) -> list[tuple[Path, int]]:
    """Folders of the group this process is in and of all above it; inside a container the path may
    lie outside of what is mounted.
    """
    base = root / "sys/fs/cgroup" / controller
    groups = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(",") and (version == 1 or not controllers):
            own = base / path.strip("/")
            groups += [
                folder for folder in (own, *own.parents) if folder == base or base in folder.parents
            ]
    return [(folder, version) for folder in groups if folder.is_dir()]


def _cpu_quotas(root: Path) -> list[tuple[int, int]]:
    quotas = []
    for folder, _ in _groups(root, "", 2):
        words = " ".join(_lines(folder / "cpu.max")).split()
        quotas.append(
            (int(words[0]), int(words[1])) if len(words) == 2 and words[0].isdigit() else (0, 0)
        )
    for folder, _ in _groups(root, "cpu", 1):
        quotas.append(
            (_number(folder / "cpu.cfs_quota_us") or 0, _number(folder / "cpu.cfs_period_us") or 0)
        )
    return [(quota, period) for quota, period in quotas if quota > 0 and period > 0]


def _reclaimable(folder: Path, version: int) -> int:
    """File pages that the kernel drops before it runs out: they count as used but are not."""
    names = (
        ("inactive_file", "active_file")
        if version == 2
        else ("total_inactive_file", "total_active_file")
    )
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in names)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
