"""Cached blocks are released when the machine's free RAM runs low (promise 16)."""

from __future__ import annotations

import logging
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch

from lowvram.hardware.cgroups import HostMemory
from lowvram.memory import arena
from lowvram.models import wan
from lowvram.planner.phases import PlanChoice
from lowvram.sampling import recovery
from tests.faults.runs import CHOICE, request
from tests.helpers.runs import digest, plan_of
from tests.helpers.staged import StagedPipeline
from tests.helpers.threads import lowvram_threads


class Counted:
    """Counts blocks computed, and by budget the bytes of buffers for blocks and workspace that live
    now and at most.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.blocks, self.live_bytes, self.peak_bytes = (
            0,
            {"VRAM": 0, "RAM": 0},
            {"VRAM": 0, "RAM": 0},
        )
        compute, allocate = wan.WanTransformer._run_block, arena.Ledger.allocate

        def run_block(model: wan.WanTransformer, *arguments: Any) -> None:
            self.blocks += 1
            compute(model, *arguments)

        def counted(
            ledger: arena.Ledger, label: str, nbytes: int, device: torch.device
        ) -> torch.Tensor:
            buffer = allocate(ledger, label, nbytes, device)
            self._change(ledger.name, nbytes)
            weakref.finalize(buffer.untyped_storage(), self._change, ledger.name, -nbytes)
            return buffer

        patch.setattr(wan.WanTransformer, "_run_block", run_block)
        patch.setattr(arena.Ledger, "allocate", counted)

    def _change(self, budget: str, nbytes: int) -> None:
        self.live_bytes[budget] += nbytes
        self.peak_bytes[budget] = max(self.peak_bytes[budget], self.live_bytes[budget])


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [CHOICE, PlanChoice(64, 1, 1, 1, True, pinned_blocks=1)],
    ids=["streamed", "one resident, shared visits"],
)
def test_p16_another_program_takes_the_ram_in_the_middle_of_a_step(
    pipeline: StagedPipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    choice: PlanChoice,
) -> None:
    """In front of any block: cached blocks are handed back there and then, no block is computed
    twice, and no bit changes.
    """
    asked = request(pipeline, num_frames=1)
    plan = plan_of(pipeline, asked, choice)

    def latents() -> str:
        with torch.no_grad():
            return digest(pipeline.latents(pipeline.new_run(asked, plan)))

    monkeypatch.setattr(recovery, "FREE_RAM_PERIOD_S", 0.0)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        whole = latents()
        blocks, peak_bytes = counted.blocks, counted.peak_bytes
    visits = blocks // 2 if choice.joint_guidance else blocks
    assert visits == 3 * 2 * (1 if choice.joint_guidance else 2)
    for low in (0, 1, 2, visits // 2 + 1, visits - 1):
        readings: list[int] = []

        def host(low: int = low, readings: list[int] = readings) -> HostMemory:
            readings.append(len(readings))
            return HostMemory(16 * 2**30, 2**20 if readings[-1] == low else 8 * 2**30, "machine")

        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(recovery, "host_memory", host)
            counted = Counted(patch)
            assert latents() == whole, low
        assert counted.blocks == blocks, "no block is computed twice"
        assert counted.peak_bytes == peak_bytes, (
            "old slots and blocks are gone before new ones are made"
        )
        assert not any(counted.live_bytes.values())
        (said,) = [record.getMessage() for record in caplog.records]
        kept = choice.host_blocks // 2
        assert (
            f"keeping {kept} blocks in RAM instead of {choice.host_blocks}"
            if kept
            else "reading every block from the disk"
        ) in said
        assert len(readings) == (visits if kept else low + 1), (
            "looked at between all blocks while any is kept"
        )
        assert not lowvram_threads()


def test_free_ram_is_not_looked_at_more_often_than_the_period(
    pipeline: StagedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[float] = []
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.5  # a block takes this long
        return clock[0]

    def host() -> HostMemory:
        readings.append(clock[0])
        return HostMemory(16 * 2**30, 8 * 2**30, "machine")

    monkeypatch.setattr(recovery, "monotonic", now)
    monkeypatch.setattr(recovery, "host_memory", host)
    asked = request(pipeline)
    pipeline.generate(asked, plan=plan_of(pipeline, asked, CHOICE))
    assert recovery.FREE_RAM_PERIOD_S == 2.0
    assert len(readings) >= 2
    assert all(2.0 <= after - before <= 3.0 for before, after in pairwise(readings))
