"""One request under one plan: ledgers, block streams and retries after out-of-memory errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from lowvram.errors import OutOfMemoryError
from lowvram.memory.arena import Ledger
from lowvram.memory.out_of_memory import retry_out_of_memory
from lowvram.planner.fallback import RAM, VRAM
from lowvram.planner.phases import PHASES, Host, PlanChoice
from lowvram.planner.plan import MemoryPlan, describe_plan
from lowvram.progress import Listener
from lowvram.request import Request, Workload
from lowvram.store.reader import Store
from lowvram.streaming.block import Blocks
from lowvram.streaming.schedule import BlockId
from lowvram.streaming.stream import Buffers, open_stream
from lowvram.streaming.transport import Transport
from lowvram.units import format_memory

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Run:
    """State shared by the phases of a request. vram, ram: ledgers that refuse more than the plan
    grants.

    lean: the current phase is to use its leaner way (`Phase.leaner`); resumable: finished steps of
    this request are saved.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        host: Host,
        request: Request,
        plan: MemoryPlan,
        listener: Listener,
        make_transport: Callable[[], Transport],
    ) -> None:
        """make_transport: makes the transport of a stream; called for every stream."""
        self.store, self.device, self.host = store, device, host
        self.request, self.plan, self.listener = request, plan, listener
        self._make_transport = make_transport
        self.lean = self.resumable = False
        self.vram, self.ram = (
            Ledger("VRAM", plan.peak_vram_bytes),
            Ledger("RAM", plan.peak_ram_bytes),
        )
        self.vram.charge("the driver's context", host.context_bytes)
        self.ram.charge("the process", host.process_bytes)

    @property
    def workload(self) -> Workload:
        """The workload of the request."""
        return self.plan.workload

    def describe(self, choice: PlanChoice) -> MemoryPlan:
        """The plan of this request with another choice."""
        return describe_plan(self.workload, choice, self.host)

    def go_on_with(self, plan: MemoryPlan) -> None:
        """Replace the plan; the ledgers grant what the new one does."""
        self.plan = plan
        self.vram.limit_bytes, self.ram.limit_bytes = plan.peak_vram_bytes, plan.peak_ram_bytes

    def stream(
        self, schedule: Sequence[BlockId], buffers: Buffers
    ) -> AbstractContextManager[Blocks]:
        """Open a stream of the blocks in `schedule`."""
        return open_stream(
            self.store.files,
            schedule,
            buffers,
            self.vram,
            self.ram,
            self.device,
            self._make_transport(),
        )

    def phase(self, name: str, work: Callable[[], T]) -> T:
        """The result of `work`. After an out-of-memory error it runs once more with all unused
        memory released, then in the phase's `leaner` way.

        Raises `OutOfMemoryError` naming the phase.
        """
        leaner = _leaner(name)
        ways = iter([("once more", False), *([(f"with {leaner}", True)] if leaner else [])])

        def recover(short: str, failure: str) -> None:
            way = next(ways, None)
            if way is None:
                raise self.exhausted(name, f"the {name} phase", short, failure)
            _log.warning(
                "out of %s in the %s phase (%s): trying it %s; the video stays the same",
                short,
                name,
                failure,
                way[0],
            )
            self.lean = way[1]

        self.lean = False
        return retry_out_of_memory(self.device, work, recover)

    def exhausted(self, phase: str, where: str, short: str, failure: str) -> OutOfMemoryError:
        """The error for a phase that found too little memory: what it needs by the current plan,
        and what to do. phase: its name in the plan; short: the budget.
        """
        planned = {
            peak.phase: peak.vram_bytes if short == VRAM else peak.ram_bytes
            for peak in self.plan.phases
        }
        needs = f"{format_memory(planned.get(phase, 0))} of {short}"
        if phase not in planned:
            needs = f"it needs less {short} than any phase of the plan"
        elif phase == "denoise":
            needs = f"with everything given up that it can, it needs {needs}"
        elif _leaner(phase):
            needs = f"it needs {needs}, and with {_leaner(phase)} it still found too little"
        else:
            needs = f"it needs {needs} and has nothing that it could give up"
        host = self.device.type == "cpu"
        advice = (
            f"close {'other programs' if short == RAM or host else 'what else uses the GPU'} and "
        )
        advice += (
            "go on with --resume from the last finished step" if self.resumable else "run it again"
        )
        if _follows_the_size(phase, short, host):
            advice += (
                f", or {'begin anew with' if self.resumable else 'pass'} a smaller --size "
                f"or fewer --frames"
            )
        return OutOfMemoryError(f"out of {short} in {where} ({failure}): {needs}; {advice}", short)


def _leaner(phase: str) -> str | None:
    return PHASES[phase].leaner if phase in PHASES else None


def _follows_the_size(phase: str, short: str, host: bool) -> bool:
    """Whether a smaller or shorter video reduces the phase's use of a budget. host: both budgets
    are the same memory.
    """
    return phase == "denoise" or (phase == "decode" and (short == RAM or host))
