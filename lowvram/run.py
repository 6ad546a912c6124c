"""One request under one memory plan: its ledgers, its streams, and what happens when memory is gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from lowvram.checkpoint.store import Store
from lowvram.config import LatentShape, Request, format_bytes, latent_shape
from lowvram.errors import OutOfMemoryError
from lowvram.memory.arena import Ledger
from lowvram.memory.exhaustion import as_out_of_memory, hand_back
from lowvram.memory.ladder import RAM
from lowvram.memory.plan import Choice, Host, MemoryPlan, describe_plan
from lowvram.progress import Listener
from lowvram.streaming.stream import Buffers, open_stream
from lowvram.streaming.streamer import Streamer
from lowvram.streaming.transport import Transport
from lowvram.streaming.visits import BlockId

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Run:
    """What every phase of a request works with. `vram` and `ram` count what is handed out and refuse more than the plan grants."""

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
        """make_transport: how blocks reach the device, made anew for every stream."""
        self.store, self.device, self.host = store, device, host
        self.request, self.plan, self.listener = request, plan, listener
        self._make_transport = make_transport
        self.vram, self.ram = Ledger("VRAM", plan.peak_vram_bytes), Ledger("RAM", plan.peak_ram_bytes)
        self.vram.charge("the driver's context", host.context_bytes)
        self.ram.charge("the process", host.process_bytes)

    @property
    def shape(self) -> LatentShape:
        return latent_shape(self.store.config, self.request.width, self.request.height, self.request.num_frames)

    def describe(self, choice: Choice) -> MemoryPlan:
        """The plan that `choice` makes of this request."""
        size = (self.request.width, self.request.height)
        return describe_plan(self.store.config, self.store.format, size, self.request.num_frames, self.request.steps, choice, self.host)

    def go_on_with(self, plan: MemoryPlan) -> None:
        """From here on the ledgers grant what this plan does."""
        self.plan = plan
        self.vram.limit_bytes, self.ram.limit_bytes = plan.peak_vram_bytes, plan.peak_ram_bytes

    def stream(self, schedule: Sequence[BlockId], buffers: Buffers) -> AbstractContextManager[Streamer]:
        return open_stream(self.store.files, schedule, buffers, self.vram, self.ram, self.device, self._make_transport())

    def phase(self, name: str, work: Callable[[], T]) -> T:
        """`work`, and once more with everything handed back that is not in use where it ran out of memory.

        Raises `OutOfMemoryError` naming the phase.
        """
        hand_back(self.device)  # what the phase before has left in torch's allocator
        for attempt in range(2):
            try:
                with as_out_of_memory():
                    return work()
            except OutOfMemoryError as error:
                short, failure = error.budget, str(error)
            hand_back(self.device)
            if attempt == 0:
                _log.warning("out of %s in the %s phase (%s): trying it once more", short, name, failure)
        raise self.exhausted(f"the {name} phase", short, failure)

    def exhausted(self, where: str, short: str, failure: str) -> OutOfMemoryError:
        peak = self.plan.peak_vram_bytes if short == "VRAM" else self.plan.peak_ram_bytes
        others = "other programs" if short == RAM or self.device.type == "cpu" else "what else uses the GPU"
        return OutOfMemoryError(
            f"out of {short} in {where} ({failure}): a run that gives up everything it can needs {format_bytes(peak)} of {short}; "
            f"close {others} and go on with --resume, or pass a smaller --size or fewer --frames",
            short,
        )
