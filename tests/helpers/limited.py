"""A run in a process of its own under a hard limit of memory: `python -m tests.helpers.limited
STORE WIDTH HEIGHT FRAMES CHUNK KIND SHARE`.

KIND: `private`, RLIMIT_DATA of what the process holds and the plan; or `group`, a memory control
group, root's to make, for all that the process takes from then on, file pages included. SHARE: of
what the plan grants beyond the process.
Prints JSON: `rss_bytes`, the most that was resident during the run; `plan_bytes`, what the plan
grants, `base_bytes` of them to the process as it was before. Linux only. Exits with 3 where no
group can be made.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowvram.memory.malloc import return_freed_memory
from lowvram.pipeline import Pipeline
from lowvram.planner.phases import PlanChoice
from lowvram.store.reader import open_store
from scripts.bench.memory_group import NoGroupError, memory_group
from tests.helpers.runs import CPU, plan_of

# Small objects, the libraries' own buffers and the stacks of threads.
SMALL_BYTES = 16 * 2**20
# What a group counts and no plan knows: page tables, files' pages, and pages of before that the
# process has given back and takes anew.
GROUP_BYTES = 16 * 2**20


def status(name: str) -> int:
    """One field of /proc/self/status, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{name}:")


@contextmanager
def private_limit(nbytes: int) -> Iterator[None]:
    """No more than `nbytes` of private memory beside what the process has."""
    limit = status("VmData") + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    yield


@contextmanager
def group_limit(nbytes: int) -> Iterator[None]:
    """The same for everything that is taken from now on: pages that the process has already stay
    with the group that they came from.
    """
    with memory_group(nbytes + GROUP_BYTES) as group, group.holding(os.getpid()):
        yield


LIMITS = {"private": private_limit, "group": group_limit}


def main(
    store: str, width: str, height: str, frames: str, chunk: str, kind: str, share: str
) -> None:
    torch.set_num_threads(1)
    threading.stack_size(512 * 1024)
    return_freed_memory()
    with open_store(Path(store)) as opened:
        warm = Pipeline(opened, CPU, 2**40, 2**40, 0)
        # what libraries load at their first use
        warm.generate(warm.request("a ball", width=64, height=64, num_frames=5, steps=1))
        base = status("VmRSS")
        pipeline = Pipeline(opened, CPU, 2**40, 2**40, base + SMALL_BYTES)
        request = pipeline.request(
            "a ball", width=int(width), height=int(height), num_frames=int(frames), steps=2
        )
        plan = plan_of(pipeline, request, PlanChoice(int(chunk), 2, 0, 0, False))
        planned = max(phase.vram_bytes + phase.ram_bytes for phase in plan.phases)
        with LIMITS[kind](int((planned - base) * float(share))):
            Path("/proc/self/clear_refs").write_text("5")
            pipeline.generate(request, plan=plan)
        print(json.dumps({"rss_bytes": status("VmHWM"), "base_bytes": base, "plan_bytes": planned}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except NoGroupError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
