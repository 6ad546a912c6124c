"""The planner's arithmetic: the table of design section 5, budgets that hold, refusals that say
what would do.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from lowvram.errors import BudgetError, LowvramError, UsageError
from lowvram.planner.choose import choose_plan
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import MemoryPlan, describe_plan
from lowvram.request import Request, Workload, latent_shape
from lowvram.store.layout import component_layout
from lowvram.timing.cards import find_card
from lowvram.timing.forecast import Forecast
from lowvram.units import parse_bytes, parse_size
from lowvram.variants import I2V_A14B, T2V_A14B

CUDA = Host.of("cuda")
HD, GIB = (1280, 720), 2**30


def plan_for(vram_gib: float, ram_gib: float, size: tuple[int, int] = HD) -> MemoryPlan:
    return choose_plan(
        Workload.of(T2V_A14B, "int8", size, 81, 40), CUDA, int(vram_gib * GIB), int(ram_gib * GIB)
    )


def test_the_table_of_the_design_at_720p() -> None:
    """x 1.55 GB, K and V 0.77 GB of codes (and 60 MB of scales), chunk about 0.5 GB at most, two
    slots 0.71 GB: about 3.6 GB.
    """
    plan = describe_plan(
        Workload.of(T2V_A14B, "int8", HD, 81, 40), PlanChoice(8192, 2, 0, 0, False), CUDA
    )
    assert plan.workload.num_tokens == 75_600
    assert plan.items["residual stream"] == 75_600 * 5120 * 4
    codes = 75_600 * 5120 + 75_648 * 5120  # keys; values, padded to whole tiles
    scales = (75_648 * 40 + 2 * 5120 * 1182) * 4  # of keys; of values, with offsets
    assert plan.items["keys and values"] == codes + scales
    assert 0.3e9 < plan.items["chunk workspace"] < 0.5e9
    assert plan.items["block slots"] == pytest.approx(0.704e9, rel=0.01)
    rows = ("residual stream", "keys and values", "chunk workspace", "block slots")
    assert sum(plan.items[name] for name in rows) == pytest.approx(3.6e9, rel=0.05)
    beside = (*rows, "context of the driver", "allocator rounding")
    others = sum(nbytes for name, nbytes in plan.items.items() if name not in beside)
    # conditioning, latents, temporaries: what the design's table leaves out
    assert 0 < others < 0.4e9


def test_rounding_of_the_allocator_is_an_item_where_there_is_one() -> None:
    """Segments of torch's caching allocator: on a device of its own, never on a CPU; a few per cent
    of the smallest plan.
    """

    def plan(host: Host, choice: PlanChoice) -> MemoryPlan:
        return describe_plan(Workload.of(T2V_A14B, "int8", HD, 81, 40), choice, host)

    for choice in (PlanChoice(64, 1, 0, 0, False), PlanChoice(8192, 0, 40, 0, True)):
        made, on_host = plan(CUDA, choice), plan(Host.of("cpu"), choice)
        assert 0 < made.items["allocator rounding"] < 0.05 * made.peak_vram_bytes
        assert "allocator rounding" not in on_host.items
        assert sum(made.items.values()) == next(
            phase.vram_bytes for phase in made.phases if phase.phase == "denoise"
        )
    bare = plan(replace(CUDA, context_bytes=0), choice)
    for phase, without in zip(made.phases, bare.phases, strict=True):
        assert phase.vram_bytes > without.vram_bytes + CUDA.context_bytes
    one, two = (
        plan(CUDA, PlanChoice(64, 1, count, 0, False)).items["allocator rounding"]
        for count in (0, 1)
    )
    assert 0 < two - one < 2 * 2**20


def test_a_block_is_as_large_as_the_spec_says() -> None:
    layout = component_layout("high_noise", T2V_A14B, "int8")
    assert len(layout.blocks) == 40
    assert layout.block_bytes == pytest.approx(352e6, rel=0.002)
    # weights, scales, biases, small, markers
    assert sum(len(layout.blocks[0]) for _ in range(40)) == 40 * (10 + 10 + 10 + 7 + 10)
    assert component_layout("high_noise", T2V_A14B, "bf16").total_bytes == pytest.approx(
        28.577e9, rel=0.02
    )


@pytest.mark.parametrize("size", [HD, (832, 480)])
@pytest.mark.parametrize("vram_gib", [5, 6, 8, 12, 16, 24, 80])
@pytest.mark.parametrize("ram_gib", [4, 8, 16, 32, 64])
def test_no_plan_exceeds_its_budgets(size: tuple[int, int], vram_gib: int, ram_gib: int) -> None:
    plan = plan_for(vram_gib, ram_gib, size)
    assert plan.peak_vram_bytes <= vram_gib * GIB
    assert plan.peak_ram_bytes <= ram_gib * GIB
    assert 0 <= plan.choice.resident_blocks + plan.choice.host_blocks <= plan.num_blocks


def test_more_memory_is_spent_on_residency() -> None:
    residents = [plan_for(vram, 16).choice.resident_blocks for vram in (5, 6, 8, 12, 24)]
    assert residents == sorted(residents)
    assert residents[0] < residents[-1] == 40
    cached = [plan_for(6, ram).choice.host_blocks for ram in (4, 8, 16)]
    assert cached == sorted(cached)
    assert cached[0] < cached[-1]


def test_a_refusal_names_the_smallest_budget_and_that_budget_works() -> None:
    with pytest.raises(BudgetError, match="VRAM") as refused:
        plan_for(2, 16)
    smallest = re.search(r"--vram (\d+\.\d\d)GiB", str(refused.value))
    assert smallest is not None
    gibibytes = float(smallest[1])
    assert plan_for(gibibytes, 16).peak_vram_bytes <= gibibytes * 2**30
    with pytest.raises(BudgetError):
        plan_for(gibibytes - 0.02, 16)
    with pytest.raises(BudgetError, match=r"RAM of .* --ram \d+\.\d\dGiB or more"):
        plan_for(8, 1)


def test_the_vae_tile_depends_on_the_size_alone() -> None:
    assert len({plan_for(vram, ram).vae_tile_pixels for vram in (5, 24) for ram in (4, 64)}) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 830}, "width 830 is not a positive multiple of 16: use 832"),
        ({"height": 0}, "height 0 is not a positive multiple of 16: use 16"),
        ({"num_frames": 80}, "frames 80 is not 4n+1: use 81"),
        ({"steps": 0}, "steps 0 is less than 1"),
        ({"solver": "ddim"}, "unknown solver 'ddim': use one of unipc, euler"),
        ({"seed": -5}, "seed -5 is outside"),
        ({"shift": float("nan")}, "shift nan is not a positive number"),
        ({"guidance_low": float("inf")}, "guidance_low inf is not a finite number"),
    ],
)
def test_impossible_requests_say_what_would_be_possible(
    changes: dict[str, object], text: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        Request("a circle", **changes)  # type: ignore[arg-type]


def test_sizes_and_amounts() -> None:
    assert parse_size("832x480") == parse_size(" 832 * 480") == (832, 480)
    assert [parse_bytes(text) for text in ("8GiB", "8GB", "8192MiB", "1.5 gb", "2000000")] == [
        8 * GIB,
        8 * 10**9,
        8 * GIB,
        15 * 10**8,
        2_000_000,
    ]
    for text in ("8Gi", "-1GB", "", "eight"):
        with pytest.raises(UsageError):
            parse_bytes(text)
    with pytest.raises(LowvramError, match="832x480"):
        parse_size("832")
    assert latent_shape(T2V_A14B, 832, 480, 81).shape == (16, 21, 60, 104)


def forecast_of(card: str, ram_gib: float = 16, format: str = "int8", **speeds: float) -> Forecast:
    profile = find_card(card).profile(int(ram_gib * GIB), **speeds)
    return Forecast(Workload.of(T2V_A14B, format), profile)


def timed_plan(
    clock: Forecast,
    vram_gib: float,
    ram_gib: float,
    size: tuple[int, int],
    frames: int,
    format: str = "int8",
) -> MemoryPlan:
    limit = clock.pinned_limit_bytes
    budgets = int(vram_gib * GIB), int(ram_gib * GIB)
    return choose_plan(
        Workload.of(T2V_A14B, format, size, frames, 40),
        CUDA,
        *budgets,
        clock=clock,
        pinned_limit_bytes=limit,
    )


SMALL, SHORT = (480, 272), (832, 480)


@pytest.mark.parametrize("card", ["RTX 3060 12GB", "RTX 4090", "H200"])
@pytest.mark.parametrize(("size", "frames"), [(HD, 81), (SHORT, 33), (SMALL, 17)])
@pytest.mark.parametrize(("vram_gib", "ram_gib"), [(5, 4), (6, 16), (8, 8), (12, 64), (24, 16)])
def test_a_plan_by_prediction_fits_and_is_no_slower_than_the_rule(
    card: str, size: tuple[int, int], frames: int, vram_gib: int, ram_gib: int
) -> None:
    clock = forecast_of(card, ram_gib)
    began = time.perf_counter()
    plan = timed_plan(clock, vram_gib, ram_gib, size, frames)
    # well under one second on a machine that does nothing else
    assert time.perf_counter() - began < 3
    assert plan.peak_vram_bytes <= vram_gib * GIB
    assert plan.peak_ram_bytes <= ram_gib * GIB
    choice = plan.choice
    assert (
        0 <= choice.pinned_blocks <= choice.host_blocks <= plan.num_blocks - choice.resident_blocks
    )
    assert (choice.pinned_blocks + plan.staging_buffers) * plan.slot_bytes <= max(
        ram_gib * GIB / 2, plan.staging_buffers * plan.slot_bytes
    )
    assert plan.prediction is not None
    rule = choose_plan(
        Workload.of(T2V_A14B, "int8", size, frames, 40), CUDA, vram_gib * GIB, ram_gib * GIB
    )
    assert rule.prediction is None
    by_rule = clock(rule)
    assert by_rule is not None
    assert plan.prediction.denoise_s <= by_rule.denoise_s * 1.001


def test_the_same_question_has_the_same_answer() -> None:
    plans = [timed_plan(forecast_of("RTX 4090"), 8, 16, SMALL, 17) for _ in range(2)]
    assert plans[0] == plans[1]


def test_short_clips_share_visits_and_long_ones_need_not() -> None:
    clock = forecast_of("RTX 4090")
    short, long = timed_plan(clock, 8, 16, SMALL, 17), timed_plan(clock, 8, 16, HD, 81)
    assert short.choice.joint_guidance
    assert not long.choice.joint_guidance
    assert long.prediction is not None
    assert long.prediction.overhead < 0.02  # design section 1, item 2, as predicted
    assert short.choice.resident_blocks > long.choice.resident_blocks


def test_more_slots_where_they_help() -> None:
    """A short clip whose blocks come by turns from page-locked RAM and from a slow disk: more slots
    bridge the slow ones.
    """
    plans = [
        timed_plan(forecast_of(card, ram), vram, ram, (640, 384), 33)
        for card in ("RTX 4090", "H200")
        for vram, ram in ((8, 16), (12, 16))
    ]
    assert any(plan.choice.ring_slots > 2 for plan in plans)


def test_half_of_the_ram_is_page_locked_at_most_and_nothing_on_a_host() -> None:
    plan = plan_for(6, 16)
    locked = (plan.choice.pinned_blocks + plan.staging_buffers) * plan.slot_bytes
    assert 0 < plan.choice.pinned_blocks < plan.choice.host_blocks
    assert locked <= 8 * GIB < locked + plan.slot_bytes
    host = choose_plan(
        Workload.of(T2V_A14B, "int8", HD, 81, 40), Host.of("cpu"), 24 * GIB, 16 * GIB
    )
    assert host.choice.pinned_blocks == 0


def test_a_format_whose_rate_nobody_knows_is_planned_without_a_time() -> None:
    plan = timed_plan(forecast_of("RTX 4090", format="fp32"), 16, 16, SMALL, 17, "fp32")
    assert plan.prediction is None
    assert plan.to_dict()["prediction"] is None
    assert plan == choose_plan(
        Workload.of(T2V_A14B, "fp32", SMALL, 17, 40), CUDA, 16 * GIB, 16 * GIB
    )


def test_image_to_video_takes_wider_latents() -> None:
    assert I2V_A14B.dit.in_dim == 36
    plans = [
        describe_plan(
            Workload.of(config, "int8", HD, 81, 40), PlanChoice(8192, 2, 0, 0, False), CUDA
        )
        for config in (T2V_A14B, I2V_A14B)
    ]
    assert plans[1].items["conditioning"] > plans[0].items["conditioning"]
    assert plans[1].slot_bytes == plans[0].slot_bytes
