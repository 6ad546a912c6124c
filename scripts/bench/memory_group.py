"""A Linux control group that holds a command and all it maps, file pages included, to a number of
bytes (cgroup v1 and v2; needs root).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path("/sys/fs/cgroup")


class NoGroupError(Exception):
    """This machine or this user cannot make a memory group; the message says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """A group of its own; the kernel kills what runs in it where it cannot stay within
    `limit_bytes`.
    """

    folder: Path
    limit_bytes: int

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` as text, inside the group from the first instruction on."""
        entrance = self.folder / "cgroup.procs"
        return subprocess.run(
            command, text=True, preexec_fn=lambda: _write(entrance, os.getpid()), **options
        )

    @contextmanager
    def holding(self, pid: int) -> Iterator[None]:
        """A process that runs already, for what it takes while the context is open."""
        before = _group_of(pid, self.folder.parent)
        _write(self.folder / "cgroup.procs", pid)
        try:
            yield
        finally:
            _write(before / "cgroup.procs", pid)

    @property
    def kills(self) -> int:
        """How often the kernel has killed in this group for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            path = self.folder / name
            if path.exists():
                pairs = (line.split() for line in path.read_text().splitlines())
                return sum(int(pair[1]) for pair in pairs if pair[0] == "oom_kill")
        return 0


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group of this process's own, removed in the end. No swap. Raises `NoGroupError`."""
    folder, limits = _new_folder()
    try:
        try:
            for name, value in limits.items():
                if (folder / name).exists():
                    _write(folder / name, limit_bytes if value is None else value)
        except OSError as error:
            raise NoGroupError(f"{folder}: {error.strerror}") from error
        yield MemoryGroup(folder, limit_bytes)
    finally:
        folder.rmdir()


def _new_folder() -> tuple[Path, dict[str, int | None]]:
    """(the new group, its files to be written; None stands for the limit)."""
    candidates: tuple[tuple[Path, dict[str, int | None]], ...] = (
        (ROOT / "memory", {"memory.limit_in_bytes": None, "memory.memsw.limit_in_bytes": None}),
        (ROOT, {"memory.max": None, "memory.swap.max": 0}),
    )
    for parent, limits in candidates:
        controllers = parent / "cgroup.subtree_control"
        usable = (parent / "memory.limit_in_bytes").exists() or (
            controllers.exists() and "memory" in controllers.read_text().split()
        )
        if not usable:
            continue
        for number in count():
            folder = parent / f"lowvram-{os.getpid()}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise NoGroupError(f"{folder}: {error.strerror}") from error
            return folder, limits
    raise NoGroupError(f"{ROOT} offers no memory controller")


def _group_of(pid: int, mount: Path) -> Path:
    """The folder of the group that a process is in, in the hierarchy mounted at `mount`."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("memory" in controllers.split(",")) == (mount.name == "memory") and (
            controllers == "" or mount.name == "memory"
        ):
            return mount / path.strip("/")
    return mount


def _write(path: Path, value: int) -> None:
    path.write_text(str(value))
