"""Progress: bars on a terminal, lines in a log."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from lowvram_quantize.progress import QuantizeProgress
from rich.console import Console

from lowvram.cli import progress
from lowvram.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `lowvram.cli.progress` reads; tests add to the first."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_when_a_phase_begins_and_then_every_fifteen_seconds(
    clock: list[float],
) -> None:
    log = StringIO()
    with progress.generation_progress(Console(file=log)) as listen:
        for step in range(9):
            listen(Progress("denoise", step, 40, 4.0 * (40 - step)))
            clock[0] += 4.0
        listen(Progress("decode", 0, 21, None))
    assert log.getvalue().splitlines() == [
        "denoising",
        "denoising: 4 of 40, 2 min 24 s left",
        "denoising: 8 of 40, 2 min 8 s left",
        "decoding frames",
    ]


def test_a_terminal_gets_bars() -> None:
    screen = StringIO()
    with progress.generation_progress(
        Console(file=screen, force_terminal=True, width=100)
    ) as listen:
        listen(Progress("denoise", 2, 2, 0.0))
    assert "2/2" in screen.getvalue()


def test_quantizing_and_verifying_tell_a_log_how_far_they_are(clock: list[float]) -> None:
    log = StringIO()
    with progress.quantize_progress(Console(file=log)) as listen:
        for done in range(3):
            listen(
                QuantizeProgress(
                    "quantize", "high_noise", "x", done * 10**9, 4 * 10**9, 1e9, 4.0 - done
                )
            )
            clock[0] += 15.0
    with progress.verify_progress(Console(file=log)) as verify:
        for done in range(2):
            verify(done * 10**9, 2 * 10**9)
            clock[0] += 15.0
    assert log.getvalue().splitlines() == [
        "quantizing",
        "quantizing: 1.00 GB of 4.00 GB, 1.00 GB/s, 3 s left",
        "quantizing: 2.00 GB of 4.00 GB, 1.00 GB/s, 2 s left",
        "verifying",
        "verifying: 1.00 GB of 2.00 GB",
    ]
