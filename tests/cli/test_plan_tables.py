"""Tables of planned and actual memory."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lowvram.cli.plan_tables import compared_peaks, peaks_table
from lowvram.memory.usage import PhaseUsage
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import describe_plan
from lowvram.request import Workload
from lowvram.variants import T2V_A14B


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
        Workload.of(T2V_A14B, "int8", (832, 480), 81, 40),
        PlanChoice(8192, 2, 0, 0, False),
        Host(False, 0),
    )
    peaks = compared_peaks(plan, actual)
    table = peaks_table(peaks)
    assert [str(column.header) for column in table.columns] == ["phase", *columns]
    screen = StringIO()
    Console(file=screen, width=120).print(table)
    row = next(line for line in screen.getvalue().splitlines() if "denoising" in line)
    assert ("1.86 GiB" in row) == bool(actual)
    assert peaks["planned"]["denoise"]["vram_bytes"] == next(
        phase.vram_bytes for phase in plan.phases if phase.phase == "denoise"
    )
