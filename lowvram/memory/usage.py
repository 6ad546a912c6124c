"""Measure the peak memory of each phase: VRAM by torch's allocator, RAM by the system."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PhaseEvent(Protocol):
    """An event of a run, as far as `PhasePeaks` reads it."""

    @property
    def phase(self) -> str:
        """Name of the phase that emitted the event."""
        ...


Event = TypeVar("Event", bound=PhaseEvent)


@dataclass(frozen=True)
class PhaseUsage:
    """Peak memory of one phase in bytes; None where it cannot be measured.

    vram_bytes: of the device, including the CUDA context; ram_bytes: resident memory of the
    process, including mapped file pages and, on a CPU, the memory that the plan calls VRAM.
    """

    vram_bytes: int | None
    ram_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as data for JSON."""
        return asdict(self)


class PhasePeaks:
    """Event listener that measures the peak memory of each phase and forwards all events.

    A phase lasts from its first event to the first event of the next phase.
    context_bytes: device memory of the CUDA context, added to each VRAM peak.
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
        """Note the peaks of a finished phase, and pass the event on."""
        if event.phase != self._phase:
            self._close()
            self._phase = event.phase
            self._reset()
        self._listener(event)

    @property
    def by_phase(self) -> dict[str, PhaseUsage]:
        """Peak memory of each phase so far, the current one included."""
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
    """Peak resident memory of this process since its start or `reset_peak_rss`, None if unknown."""
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
    """Reset the peak of `peak_rss_bytes`; no effect on systems without that function."""
    if os.access(_CLEAR_REFS, os.W_OK):
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            return
