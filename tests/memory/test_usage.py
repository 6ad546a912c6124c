"""What phases take, as the system and torch's allocator count it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowvram.memory import usage
from lowvram.memory.malloc import return_freed_memory
from lowvram.memory.usage import PhasePeaks, peak_rss_bytes, reset_peak_rss
from lowvram.progress import Progress

HELD = 64 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_each_phase_has_a_peak_of_its_own() -> None:
    return_freed_memory()
    seen: list[str] = []
    peaks = PhasePeaks(lambda event: seen.append(event.phase), "cpu", 0)
    for phase, held in (("text", 0), ("denoise", HELD), ("decode", 0)):
        peaks(Progress(phase, 0, 1, None))
        torch.ones(max(held, 1), dtype=torch.uint8).sum()
        peaks(Progress(phase, 1, 1, 0.0))
    found = {phase: taken.ram_bytes or 0 for phase, taken in peaks.by_phase.items()}
    assert seen == 2 * ["text"] + 2 * ["denoise"] + 2 * ["decode"]
    assert found["denoise"] - found["text"] > 0.9 * HELD
    assert found["denoise"] - found["decode"] > 0.9 * HELD
    assert all(taken.vram_bytes is None for taken in peaks.by_phase.values())


def test_the_device_has_its_context_beside_what_torch_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reserved = {"now": 0}
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reserved.update(now=0))
    peaks = PhasePeaks(lambda event: None, "cuda", 600)
    for phase, taken in (("text", 50), ("denoise", 1000)):
        peaks(Progress(phase, 0, 1, None))
        reserved["now"] = taken
    assert {phase: usage.vram_bytes for phase, usage in peaks.by_phase.items()} == {
        "text": 650,
        "denoise": 1600,
    }


def test_a_system_that_does_not_say_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "nothing"
    monkeypatch.setattr(usage, "_STATUS", missing)
    monkeypatch.setattr(usage, "_CLEAR_REFS", missing)
    reset_peak_rss()
    assert peak_rss_bytes() is None
