"""What the phases of a run really take: the device's memory as torch's allocator counts it, the
process's as the system does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PhaseEvent(Protocol):
    """What is read of an event: the name of the phase that it comes from."""

    @property
    def phase(self) -> str: ...


Event = TypeVar("Event", bound=PhaseEvent)


@dataclass(frozen=True)
class PhaseUsage:
    """The most that one phase took, in bytes. vram: of the device, its context included; ram: of
    the process, file pages that it has mapped included, and on a CPU what the plan calls VRAM too.
    None where this machine cannot tell.
    """

    vram_bytes: int | None
    ram_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PhasePeaks:
    """A listener that passes every event on and keeps what each phase took, from its first event to
    the next phase's.
    """

    def __init__(
        self, listener: Callable[[Any], None], device_type: str, context_bytes: int
    ) -> None:
        self._listener = listener
        self._cuda = device_type == "cuda"
        self._context_bytes = context_bytes
        self._phase: str | None = None
        self._found: dict[str, PhaseUsage] = {}

    def __call__(self, event: PhaseEvent) -> None:
        if event.phase != self._phase:
            self._close()
            self._phase = event.phase
            self._reset()
        self._listener(event)

    @property
    def by_phase(self) -> dict[str, PhaseUsage]:
        """Of every phase up to now."""
        self._close()
        return dict(self._found)

    def _close(self) -> None:
        if self._phase is not None:
            self._found[self._phase] = PhaseUsage(self._device_peak(), peak_rss_bytes())

    def _reset(self) -> None:
        reset_peak_rss()
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def _device_peak(self) -> int | None:
        if not self._cuda:
            return None
        import torch

        return torch.cuda.max_memory_reserved() + self._context_bytes


def peak_rss_bytes() -> int | None:
    """The most of this process that was resident since the start or `reset_peak_rss`; None where
    the system does not say.
    """
    try:
        found = re.search(
            r"^VmHWM:\s+(\d+) kB$",
            _STATUS.read_text(encoding="ascii", errors="replace"),
            re.MULTILINE,
        )
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reset_peak_rss() -> None:
    """From now on `peak_rss_bytes` counts anew; where the system has no such switch it goes on."""
    if os.access(_CLEAR_REFS, os.W_OK):
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            return
