"""docs/plans.md and docs/streaming.md say what the planner and the model of time say: some of their lines, made again."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from lowvram.config import I2V_A14B, T2V_A14B

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import plans

    monkeypatch.delitem(sys.modules, "plans")
    return plans


def lines(name: str) -> list[str]:
    return (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("vram_gb", "ram_gb"), [(24, 64), (8, 16), (6, 8)])
def test_plans_are_those_of_the_planner(plans: ModuleType, vram_gb: int, ram_gb: int) -> None:
    for config in (T2V_A14B, I2V_A14B):
        for size in plans.SIZES:
            assert plans.plan_row(config, size, vram_gb, ram_gb) in lines("plans.md"), "run python scripts/plans.py"


def test_every_asked_combination_is_answered() -> None:
    rows = [line for line in lines("plans.md") if line.startswith("| ") and " GB | " in line]
    assert len(rows) == 2 * 2 * 5 * 4  # variants, sizes, VRAM, RAM
    assert all("predicted" in line for line in lines("plans.md") if line.startswith("| VRAM"))


def test_thresholds_are_those_of_the_simulation(plans: ModuleType) -> None:
    for row in (plans.SECTION_5[1], plans.SECTION_5[4]):
        assert plans.threshold_row(row) in lines("streaming.md"), "run python scripts/plans.py"
    assert plans.hidden_row("RTX 4060 8GB") in lines("streaming.md"), "run python scripts/plans.py"


def test_the_simulation_agrees_with_the_closed_form_and_the_facts(plans: ModuleType) -> None:
    """kernels 5 leaves cross-attention and the text out of its thresholds."""
    for row in plans.SECTION_5:
        for generation, facts in zip(plans.GENERATIONS, row.facts, strict=True):
            assert plans.threshold(row, generation) == pytest.approx(plans.closed_form(row, generation), rel=0.005)
            if facts:
                assert plans.closed_form(row, generation) <= facts <= plans.closed_form(row, generation) * 1.07
