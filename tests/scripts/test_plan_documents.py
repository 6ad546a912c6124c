"""docs/plans.md and docs/streaming.md say what the planner and the model of time say: every line is
made again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowvram.timing.predict import attention_ops, linear_ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from scripts import plans

    monkeypatch.delitem(sys.modules, "scripts.plans")
    return plans


def lines(name: str) -> list[str]:
    return (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()


def test_every_asked_combination_is_answered() -> None:
    rows = [line for line in lines("plans.md") if line.startswith("| ") and " GiB | " in line]
    assert len(rows) == 2 * 2 * 5 * 4  # variants, sizes, VRAM, RAM
    assert all("predicted" in line for line in lines("plans.md") if line.startswith("| VRAM"))


def test_a_card_is_planned_for_with_the_vram_that_it_has(plans: ModuleType) -> None:
    """Times of the RTX 3060 12GB stand where it has the VRAM, and nowhere else; what is asked is
    answered by a card that has it.
    """
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in lines("plans.md")
        if line.startswith("| ") and " GiB | " in line
    ]
    for vram, _, *plan, small_step, small_video, large_step, large_video in cells:
        has = int(vram.split()[0]) <= 12
        assert (small_step != "-", small_video != "-") == (has, has)
        assert "-" not in (*plan, large_step, large_video)


def test_every_line_is_what_the_script_writes(
    plans: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plans.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_line_is_noticed(
    plans: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plans, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{plans.CARDS_BEGIN}{plans.CARDS_END}\n", encoding="utf-8")
    monkeypatch.setattr(plans, "readme_cards", lambda: "1.5 min")
    for name in ("plans", "streaming"):
        monkeypatch.setattr(plans, f"{name}_document", lambda name=name: f"# {name}\n| 1.5 s |\n")
    assert plans.main(["--check"]) == 1
    assert plans.main([]) == 0
    assert plans.main(["--check"]) == 0
    for name in ("docs/plans.md", "docs/streaming.md", "README.md"):
        path = tmp_path / name
        good = path.read_text(encoding="utf-8")
        path.write_text(good.replace("1.5", "1.6"), encoding="utf-8")
        capsys.readouterr()
        assert plans.main(["--check"]) == 1
        assert str(path) in capsys.readouterr().out
        path.write_text(good, encoding="utf-8")


def test_the_simulation_agrees_with_the_closed_form_and_the_facts(plans: ModuleType) -> None:
    """kernels 5 leaves cross-attention and the text's keys and values out of its thresholds:
    linears and self-attention alone give them.
    """

    def alone(row: Any, tokens: int) -> float:
        linears, attention = (
            linear_ops(plans.DIT, tokens) / row.gemm,
            attention_ops(plans.DIT, tokens, tokens) / row.attention,
        )
        return float(linears + attention) / 1e12

    for row in plans.SECTION_5:
        for generation, facts in zip(plans.GENERATIONS, row.facts, strict=True):
            assert plans.threshold(row, generation) == pytest.approx(
                plans.closed_form(row, generation), rel=0.005
            )
            if facts:
                travel_s = plans.travel_seconds(generation)
                first = plans.first_hidden(
                    lambda tokens, row=row, travel_s=travel_s: alone(row, tokens) >= travel_s
                )
                assert facts == pytest.approx(first, rel=1e-3)
    least, most = plans.more_of_the_facts()
    assert 0 < least < most
    assert f"hence their {least:.1%} to {most:.1%} more tokens" in " ".join(lines("streaming.md"))
