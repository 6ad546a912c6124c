"""Host memory and processors available to this process, within the limits of its control groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HostMemory:
    """Host memory available to this process.

    limited_by: `machine`, or the kind of control group that sets a lower limit (`cgroup v2`).
    """

    total_bytes: int
    free_bytes: int
    limited_by: str


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Host memory: the minimum of the machine's and all limits of the process's control groups.

    root: root of the file system with `/proc` and `/sys` (cgroup v1 and v2).
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
    """Free host memory within the limits of the process's control groups."""
    return host_memory().free_bytes


def total_ram_bytes() -> int:
    """Total host memory within the limits of the process's control groups."""
    return host_memory().total_bytes


def cpu_count(root: Path = Path("/")) -> int:
    """Number of processors for this process, by its affinity and its group's quota; at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for quota, period in _cpu_quotas(root):
        count = min(count, max(1, quota // period))
    return max(1, count)


def _memory_groups(root: Path) -> list[tuple[Path, int]]:
    return [*_groups(root, "memory", 1), *_groups(root, "", 2)]


def _groups(root: Path, controller: str, version: int) -> list[tuple[Path, int]]:
    """Folders of the process's control group and of its parents.

    Inside a container some of them may not be mounted; these are left out.
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
    """Bytes of cached file pages: counted as used, but the kernel frees them when needed."""
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
