"""What a person sees: bars on a terminal, lines in a log, planned and actual memory side by
side.
"""

from __future__ import annotations

from io import StringIO

import pytest
from lowvram_quantize.progress import QuantizeProgress
from rich.console import Console

from lowvram.cli import terminal
from lowvram.memory.usage import PhaseUsage
from lowvram.planner.plan import Host, PlanChoice, describe_plan
from lowvram.progress import Progress
from lowvram.variants import T2V_A14B


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `terminal` sees; add to the first."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_when_a_phase_begins_and_then_every_fifteen_seconds(
    clock: list[float],
) -> None:
    log = StringIO()
    with terminal.generation_progress(Console(file=log)) as listen:
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
    with terminal.generation_progress(
        Console(file=screen, force_terminal=True, width=100)
    ) as listen:
        listen(Progress("denoise", 2, 2, 0.0))
    assert "2/2" in screen.getvalue()


def test_quantizing_and_verifying_tell_a_log_how_far_they_are(clock: list[float]) -> None:
    log = StringIO()
    with terminal.quantize_progress(Console(file=log)) as listen:
        for done in range(3):
            listen(
                QuantizeProgress(
                    "quantize", "high_noise", "x", done * 10**9, 4 * 10**9, 1e9, 4.0 - done
                )
            )
            clock[0] += 15.0
    with terminal.verify_progress(Console(file=log)) as verify:
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


@pytest.mark.parametrize(
    ("actual", "columns"),
    [
        (
            {"denoise": PhaseUsage(3 * 10**9, 2 * 10**9)},
            ["VRAM, planned", "VRAM, actual", "RAM, planned", "RAM, actual"],
        ),
        ({"denoise": PhaseUsage(None, 2 * 10**9)}, ["memory, planned", "memory, actual"]),
        ({}, ["memory, planned", "memory, actual"]),
    ],
    ids=["a device of its own", "a CPU", "a machine that cannot tell"],
)
def test_planned_and_actual_memory_stand_side_by_side(
    actual: dict[str, PhaseUsage], columns: list[str]
) -> None:
    plan = describe_plan(
        T2V_A14B, "int8", (832, 480), 81, 40, PlanChoice(8192, 2, 0, 0, False), Host(False, 0)
    )
    peaks = terminal.compared_peaks(plan, actual)
    table = terminal.peaks_table(peaks)
    assert [str(column.header) for column in table.columns] == ["phase", *columns]
    screen = StringIO()
    Console(file=screen, width=120).print(table)
    row = next(line for line in screen.getvalue().splitlines() if "denoising" in line)
    assert ("2.00 GB" in row) == bool(actual)
    assert peaks["planned"]["denoise"]["vram_bytes"] == next(
        phase.vram_bytes for phase in plan.phases if phase.phase == "denoise"
    )
