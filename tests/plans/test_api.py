"""`lowvram.plan` and `plan_matrix`: what no run would take is refused by the same rules, and `auto`
is what a run here would take.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.errors import BudgetError, UsageError
from lowvram.hardware import budgets as budget
from lowvram.hardware.budgets import AUTO_SHARE, Budgets
from lowvram.hardware.profile import MEASURED, MachineProfile
from lowvram.plans import api as planning
from lowvram.request import Request
from lowvram.timing.cards import CARDS, DISK_BYTES_S, find_card
from tests.helpers.checkpoints import tiny_config, write_store

GIB = 2**30


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever other tests have measured of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": 6},
        {"frames": 0},
        {"frames": "5"},
        {"steps": 0},
        {"steps": -1},
        {"steps": 1001},
        {"steps": 2.5},
        {"steps": True},
    ],
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
    clip = made.workload
    assert (clip.width, clip.height, clip.num_frames) == (64, 48, 5)
    default = planning.plan("t2v-a14b")
    clip = default.workload
    assert (clip.width, clip.height, clip.num_frames) == (1280, 720, 81)
    # of 1 step and of 40
    assert (
        made.items["conditioning"]
        < planning.plan("t2v-a14b", size="64x48", frames=5).items["conditioning"]
    )


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
    assert named == planning.plan(
        "t2v-a14b", size="832x480", gpu="RTX 3060", vram=int(card.vram_bytes * AUTO_SHARE)
    )
    assert named == planning.plan("t2v-a14b", size="832x480", gpu="RTX 3060")
    (share,) = {
        cell.vram_bytes
        for cell in planning.plan_matrix("t2v-a14b", gpu="RTX 3060", vram="auto").cells
    }
    assert share == int(card.vram_bytes * AUTO_SHARE)


def test_auto_ram_is_a_share_of_what_is_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_ram_bytes", lambda: 40 * GIB)
    for gpu in (None, "RTX 3060"):
        matrix = planning.plan_matrix("t2v-a14b", ram="auto", frames=33, gpu=gpu)
        assert matrix.ram_bytes == 34 * GIB
        asked = planning.plan("t2v-a14b", size="832x480", ram="auto", gpu=gpu)
        assert asked == planning.plan("t2v-a14b", size="832x480", ram=34 * GIB, gpu=gpu)


@pytest.mark.parametrize(("here", "context"), [("cuda", True), ("cpu", False)])
def test_auto_vram_without_a_card_is_what_a_run_here_would_take(
    here: str, context: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(vram: str, ram: str, device: str) -> Budgets:
        asked.append((vram, ram, device))
        return Budgets(here, 11 * GIB, 20 * GIB, GIB)

    monkeypatch.setattr(planning, "resolve_budgets", resolve)
    plan = planning.plan("t2v-a14b", size="832x480", vram="auto", ram="auto")
    # the plan is of the device that the run would take
    assert (plan.items["context of the driver"] > 0) == context
    assert plan == planning.plan(
        "t2v-a14b", size="832x480", vram=11 * GIB, ram=20 * GIB, device=here
    )
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
    assert plan == planning.plan(
        "t2v-a14b", size="64x64", frames=5, vram=half, ram="16GiB", device="cpu"
    )
    assert {
        cell.vram_bytes for cell in planning.plan_matrix("t2v-a14b", vram="auto", frames=33).cells
    } == {half}


@pytest.mark.parametrize("vram", ["24GB", "100000GB", 12 * GIB + 1])
def test_vram_that_a_card_has_not_is_refused_with_what_it_has(vram: str | int) -> None:
    for plan in (planning.plan, planning.plan_matrix):
        with pytest.raises(
            BudgetError, match=r"was asked for, RTX 3060 12GB has 12\.00 GiB: ask for less"
        ):
            plan("t2v-a14b", gpu="RTX 3060 12GB", vram=vram)


def test_all_that_a_card_has_is_planned() -> None:
    plan = planning.plan("t2v-a14b", size="832x480", gpu="RTX 3060 12GB", vram="12GiB")
    assert plan.prediction is not None
    assert plan.prediction.machine == "RTX 3060 12GB"
    (cell,) = planning.plan_matrix(
        "t2v-a14b", gpu="RTX 3060 12GB", vram="12GiB", sizes=[(832, 480)], frames=81
    ).cells
    assert cell.plan == plan


@pytest.mark.parametrize(
    ("vram", "machine"),
    [(None, "RTX 4090"), ("24GB", "RTX 4090"), ("30GB", "RTX 5090"), ("100GB", "H200")],
)
def test_a_matrix_without_a_card_is_that_of_one_that_has_the_vram(
    vram: str | None, machine: str
) -> None:
    matrix = planning.plan_matrix("t2v-a14b", vram=vram, frames=33, sizes=[(640, 384)])
    assert matrix.machine == machine
    card = find_card(machine)
    assert all(cell.vram_bytes <= card.vram_bytes for cell in matrix.cells)
    most = max(card.vram_bytes for card in CARDS)
    with pytest.raises(BudgetError, match=r"H200 has 131\.32 GiB"):
        planning.plan_matrix("t2v-a14b", vram=most + 1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., MachineProfile]:
    """A machine as `lowvram doctor` would have measured it, on the disk of the tests."""

    def known(card: str, **changes: Any) -> MachineProfile:
        values: dict[str, Any] = {"disk_bytes_s": 7e9, "disk_folder": str(tmp_path)} | changes
        made = replace(find_card(card).profile(), **values)
        made = replace(made, sources=dict.fromkeys(made.sources, MEASURED))
        monkeypatch.setattr(
            planning, "this_machine", lambda device: made if device == made.device else None
        )
        return made

    return known


def test_a_matrix_of_this_machine_leaves_out_what_it_has_not(
    measured: Callable[..., MachineProfile],
) -> None:
    measured("RTX 3060 12GB")
    matrix = planning.plan_matrix("t2v-a14b", frames=33, sizes=[(640, 384)])
    assert [cell.vram_bytes for cell in matrix.cells] == [12 * 2**30, 8 * 2**30, 6 * 2**30]
    with pytest.raises(BudgetError, match="RTX 3060 12GB has"):
        planning.plan("t2v-a14b", vram="16GB")
    measured("RTX 3060 12GB", vram_total_bytes=5 * GIB)
    (cell,) = planning.plan_matrix("t2v-a14b", frames=33, sizes=[(640, 384)]).cells
    assert cell.vram_bytes == int(5 * GIB * AUTO_SHARE)
    # 8 GiB, or what there is
    assert planning.plan("t2v-a14b", size="640x384", frames=33).peak_vram_bytes <= 5 * GIB


def test_auto_on_a_host_with_more_memory_than_any_card_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        planning,
        "resolve_budgets",
        lambda vram, ram, device: Budgets("cpu", 400 * GIB, 400 * GIB, GIB),
    )
    matrix = planning.plan_matrix(
        "t2v-a14b", vram="auto", ram="16GiB", frames=33, sizes=[(640, 384)]
    )
    assert (matrix.machine, matrix.cells[0].vram_bytes) == ("H200", find_card("H200").vram_bytes)
    assert planning.plan("t2v-a14b", vram="auto", ram="16GiB").peak_vram_bytes <= 400 * GIB


# of no disk; where it is missing, a folder that is gone: no disk that was measured either
OTHER_DISK = Path("/proc")


def test_a_store_on_another_disk_is_not_planned_with_the_speed_of_the_measured_one(
    measured: Callable[..., MachineProfile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = write_store(tmp_path / "model", tiny_config())
    here = measured("RTX 3060 12GB")
    asked = (None, None, 16 * GIB, "cuda")
    with caplog.at_level(logging.WARNING):
        assert planning.planned_machine(store, None, *asked) == here
        assert planning.planned_machine("t2v-a14b", None, *asked) == here
        assert not caplog.records
        elsewhere = measured("RTX 3060 12GB", disk_folder=str(OTHER_DISK))
        machine = planning.planned_machine(store, None, *asked)
    assert machine is not None
    assert (machine.disk_bytes_s, machine.sources["disk_bytes_s"]) == (DISK_BYTES_S, "table")
    assert (
        replace(machine, disk_bytes_s=7e9, disk_folder=str(OTHER_DISK), sources=elsewhere.sources)
        == elsewhere
    ), "all other rates stay"
    (told,) = [record.getMessage() for record in caplog.records]
    for text in (str(store), str(OTHER_DISK), f"lowvram doctor --path {store}", "3.50 GB/s"):
        assert text in told
    caplog.clear()
    named = planning.planned_machine(store, None, None, "2GB", 16 * GIB, "cuda")
    assert named is not None
    assert (named.disk_bytes_s, named.sources["disk_bytes_s"]) == (2e9, "given")
    assert not caplog.records, "the user knows this disk"


@pytest.mark.parametrize("speed", [{"link": "PCIe 3.0 x8"}, {"disk": "7GB"}])
def test_a_speed_without_a_prediction_is_not_ignored(
    speed: dict[str, Any], measured: Callable[..., MachineProfile]
) -> None:
    with pytest.raises(
        UsageError, match=r"no times are predicted: name a card with --gpu, or run `lowvram doctor`"
    ):
        planning.plan("t2v-a14b", **speed)
    assert planning.plan("t2v-a14b", gpu="RTX 4090", **speed).prediction is not None
    assert (
        planning.plan_matrix("t2v-a14b", frames=33, sizes=[(640, 384)], **speed).machine
        == "RTX 4090"
    )
    measured("RTX 3060 12GB")
    assert planning.plan("t2v-a14b", **speed).prediction is not None
