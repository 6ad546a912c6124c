"""`lowvram.plan` and `plan_matrix`: what no run would take is refused by the same rules, and `auto` is what a run here would take."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lowvram import planning
from lowvram.config import Request
from lowvram.errors import UsageError
from lowvram.memory import budget
from lowvram.memory.budget import AUTO_SHARE, Budgets
from lowvram.memory.cards import find_card

GIB = 2**30


@pytest.mark.parametrize(
    "changes",
    [{"frames": 6}, {"frames": 0}, {"frames": "5"}, {"steps": 0}, {"steps": -1}, {"steps": 1001}, {"steps": 2.5}, {"steps": True}],
)
def test_a_plan_refuses_what_a_request_refuses_in_the_same_words(changes: dict[str, Any]) -> None:
    fields = {"num_frames" if name == "frames" else name: value for name, value in changes.items()}
    with pytest.raises(UsageError) as refused:
        Request("a circle", **fields)
    for plan in (planning.plan, planning.plan_matrix):
        with pytest.raises(UsageError, match=f"^{re.escape(str(refused.value))}$"):
            plan("t2v-a14b", **changes)


@pytest.mark.parametrize("size", [(70, 64), (64,), "70x64", "64", 64, (64.0, 64), (0, 0)])
def test_sizes_are_judged_as_a_requests_are(size: Any) -> None:
    with pytest.raises(UsageError, match=r"width|size"):
        planning.plan("t2v-a14b", size=size)
    with pytest.raises(UsageError, match=r"width|size"):
        planning.plan_matrix("t2v-a14b", sizes=[(64, 64), size])


def test_what_is_named_is_planned() -> None:
    made = planning.plan("t2v-a14b", size=(64, 48), frames=5, steps=1)
    assert made == planning.plan("t2v-a14b", size="64x48", frames=5, steps=1)
    assert (made.width, made.height, made.num_frames) == (64, 48, 5)
    default = planning.plan("t2v-a14b")
    assert (default.width, default.height, default.num_frames) == (1280, 720, 81)
    assert made.items["conditioning"] < planning.plan("t2v-a14b", size="64x48", frames=5).items["conditioning"]  # of 1 step and of 40


@pytest.mark.parametrize("amount", [-5, 0, 1.5, True, None, "0GiB", "lots"])
def test_budgets_are_positive_amounts(amount: Any) -> None:
    for plan in (planning.plan, planning.plan_matrix):
        with pytest.raises(UsageError, match="8GiB"):
            plan("t2v-a14b", ram=amount)
        if amount is not None:
            with pytest.raises(UsageError, match="8GiB"):
                plan("t2v-a14b", vram=amount)


def test_other_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot plan for device 'cuda:1': use cuda or cpu"):
        planning.plan("t2v-a14b", device="cuda:1")


def test_auto_of_a_card_is_its_share() -> None:
    card = find_card("RTX 3060")
    named = planning.plan("t2v-a14b", size="832x480", gpu="RTX 3060", vram="auto")
    assert named == planning.plan("t2v-a14b", size="832x480", gpu="RTX 3060", vram=int(card.vram_bytes * AUTO_SHARE))
    assert named == planning.plan("t2v-a14b", size="832x480", gpu="RTX 3060")
    (share,) = {cell.vram_bytes for cell in planning.plan_matrix("t2v-a14b", gpu="RTX 3060", vram="auto").cells}
    assert share == int(card.vram_bytes * AUTO_SHARE)


def test_auto_ram_is_a_share_of_what_is_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_ram_bytes", lambda: 40 * GIB)
    for card in ({}, {"gpu": "RTX 3060"}):
        assert planning.plan_matrix("t2v-a14b", ram="auto", frames=33, **card).ram_bytes == 34 * GIB
        asked = planning.plan("t2v-a14b", size="832x480", ram="auto", **card)
        assert asked == planning.plan("t2v-a14b", size="832x480", ram=34 * GIB, **card)


@pytest.mark.parametrize(("here", "context"), [("cuda", True), ("cpu", False)])
def test_auto_vram_without_a_card_is_what_a_run_here_would_take(here: str, context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(vram: str, ram: str, device: str) -> Budgets:
        asked.append((vram, ram, device))
        return Budgets(here, 11 * GIB, 20 * GIB, GIB)

    monkeypatch.setattr(planning, "resolve_budgets", resolve)
    plan = planning.plan("t2v-a14b", size="832x480", vram="auto", ram="auto")
    assert (plan.items["context of the driver"] > 0) == context  # the plan is of the device that the run would take
    assert plan == planning.plan("t2v-a14b", size="832x480", vram=11 * GIB, ram=20 * GIB, device=here)
    assert plan.peak_vram_bytes <= 11 * GIB
    matrix = planning.plan_matrix("t2v-a14b", vram="auto", ram="12GiB", frames=33)
    assert (matrix.ram_bytes, {cell.vram_bytes for cell in matrix.cells}) == (12 * GIB, {11 * GIB})
    assert asked == [("auto", "auto", "auto")] * 2


def test_auto_vram_here_is_really_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU it is half of the share of free RAM."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(budget, "_free_ram", lambda: 64 * GIB)
    monkeypatch.setattr(budget, "_total_ram", lambda: 64 * GIB)
    plan = planning.plan("t2v-a14b", size="64x64", frames=5, vram="auto", ram="16GiB")
    half = int(64 * GIB * AUTO_SHARE / 2)
    assert plan == planning.plan("t2v-a14b", size="64x64", frames=5, vram=half, ram="16GiB", device="cpu")
    assert {cell.vram_bytes for cell in planning.plan_matrix("t2v-a14b", vram="auto", frames=33).cells} == {half}
