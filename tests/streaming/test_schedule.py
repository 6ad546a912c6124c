"""Which blocks stay where: fixed sets, evenly spread, so that what travels has the others' time to
arrive.
"""

from __future__ import annotations

import pytest

from lowvram.planner.phases import PlanChoice
from lowvram.streaming.schedule import assign_slots, spread, tiers
from lowvram.timing.forecast import simulate_choice
from lowvram.timing.simulate import HopSpeeds

BLOCK, COMPUTE_S, STEPS = 100, 1.0, 4


@pytest.mark.parametrize("total", [1, 2, 7, 40])
def test_what_is_spread_is_as_even_as_it_can_be(total: int) -> None:
    for count in range(total + 1):
        chosen = spread(count, total)
        assert len(chosen) == count
        gaps = (
            {
                after - before
                for before, after in zip([chosen[-1] - total, *chosen], chosen, strict=False)
            }
            if chosen
            else set()
        )
        assert all(total // count <= gap <= -(-total // count) for gap in gaps)


@pytest.mark.parametrize(
    ("resident", "host"), [(0, 0), (40, 0), (20, 9), (0, 17), (39, 1), (8, 32), (8, 99)]
)
def test_every_block_has_one_place(resident: int, host: int) -> None:
    on_device, in_ram = tiers(40, resident, host)
    assert len(on_device) == resident
    assert len(in_ram) == min(host, 40 - resident)
    assert not set(on_device) & set(in_ram)
    assert set(on_device) | set(in_ram) <= set(range(40))


def test_kept_blocks_are_read_once_and_residents_travel_once() -> None:
    visits = assign_slots(
        [("high", index) for _ in range(STEPS) for index in range(40)], 20, 2, 9, 2
    )
    on_device, in_ram = tiers(40, 20, 9)
    for block in range(40):
        own = visits[block::40]
        assert [visit.read for visit in own] == [True] + (STEPS - 1) * [
            block not in {*on_device, *in_ram}
        ]
        assert [visit.load for visit in own] == [True] + (STEPS - 1) * [block not in on_device]
        assert len({visit.slot for visit in own if block in on_device}) <= 1


def step_seconds(choice: PlanChoice, speeds: HopSpeeds) -> float:
    """One step between the first and the last, of forty blocks."""
    schedule = [("high", index) for _ in range(STEPS) for index in range(40)]
    visits = simulate_choice(schedule, choice, BLOCK, COMPUTE_S, speeds, 2, STEPS * [40]).visits
    return visits[40 * (STEPS - 1) - 1].compute_end_s - visits[40 * (STEPS - 2) - 1].compute_end_s


@pytest.mark.parametrize(
    ("choice", "speeds"),
    [
        (PlanChoice(64, 2, 20, 20, False, 20), HopSpeeds(1e9, 1e9, BLOCK / (1.8 * COMPUTE_S))),
        (PlanChoice(64, 2, 0, 30, False, 30), HopSpeeds(BLOCK / (3.5 * COMPUTE_S), 1e9, 1e9)),
        (PlanChoice(64, 2, 20, 10, False, 10), HopSpeeds(BLOCK / (3.5 * COMPUTE_S), 1e9, 1e9)),
    ],
    ids=["a link slower than computing", "a disk slower than computing", "both kept tiers"],
)
def test_slow_hops_are_hidden_behind_the_blocks_that_stay(
    choice: PlanChoice, speeds: HopSpeeds
) -> None:
    """Each hop is slower than computing one block, but not than the blocks between two that take
    it: a prefix would stall at its end.
    """
    assert step_seconds(choice, speeds) <= 40 * COMPUTE_S * 1.02


def test_page_locked_buffers_go_to_blocks_apart() -> None:
    """Buffers 0, 2 and 5 could be locked: every other block of the six in RAM takes one of them."""
    visits = assign_slots([("high", index) for index in range(6)], 0, 2, 6, 2, {0, 2, 5})
    assert [visit.host in (0, 2, 5) for visit in visits] == [False, True] * 3
    assert sorted(visit.host for visit in visits if visit.host is not None) == list(range(6))
    assert [visit.stage is None for visit in visits] == [False, True] * 3
