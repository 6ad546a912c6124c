"""The table of cards: the peaks that the facts give, names that people type, links and disks."""

from __future__ import annotations

import pytest

from lowvram.errors import UsageError
from lowvram.timing.cards import (
    ACHIEVABLE,
    CARDS,
    REFERENCE_CARD,
    card_with,
    find_card,
    parse_link,
    parse_speed,
)
from scripts import static_bound


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "int8"),
    [
        ("RTX 3090", 71, None, 284),
        ("RTX 4090", 165, 330, 660),
        ("RTX 5090", 209, 419, 838),
        ("A100 80GB", 312, None, 624),
        ("H200", 989, 1979, 1979),
    ],
)
def test_peaks_are_those_of_the_facts(
    name: str, bf16: float, fp8: float | None, int8: float
) -> None:
    """kernels 5."""
    card = find_card(name)
    assert card.bf16_ops_s == pytest.approx(bf16 * 1e12, rel=0.005)
    assert card.int8_ops_s == pytest.approx(int8 * 1e12, rel=0.005)
    assert card.fp8_ops_s == (None if fp8 is None else pytest.approx(fp8 * 1e12, rel=0.005))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"),
        ("rtx3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("rtx-4060-ti 16 gb", "RTX 4060 Ti 16GB"),
        ("RTX 4060", "RTX 4060 8GB"),
        ("geforce rtx 4060 laptop gpu", "RTX 4060 Laptop"),
        ("Radeon RX 7900XTX", "RX 7900 XTX"),
        ("h200", "H200"),
    ],
)
def test_names_are_found_as_people_type_them(text: str, name: str) -> None:
    assert find_card(text).name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RTX 3080", ("RTX 3080 10GB", "RTX 3080 12GB", "memory")),
        ("RTX 5060 Ti", ("RTX 5060 Ti 8GB", "RTX 5060 Ti 16GB")),
        ("RTX 4095", ("no card 'RTX 4095'", "RTX 4090")),
        ("toaster", ("no card 'toaster'", "RTX 3060 12GB", "H200")),
        ("", ("no card",)),
    ],
)
def test_other_names_say_what_is_meant(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refused:
        find_card(text)
    for word in words:
        assert word in str(refused.value)


def test_every_card_can_be_found_and_gives_a_profile() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert {card.architecture for card in CARDS} == set(ACHIEVABLE)
    for card in CARDS:
        assert find_card(card.name) is card
        profile = card.profile(16 * 2**30)
        predicted = {name for name, source in profile.sources.items() if source == "predicted"}
        computing = {"gemm_int8_ops_s", "gemm_fp8_ops_s", "attention_ops_s"}
        assert predicted == (set() if card.architecture == "rdna3" else computing)
        assert set(profile.sources.values()) <= {"table", "predicted"}
        assert profile.basis == ("table" if card.architecture == "rdna3" else "predicted")
        assert profile.gemm_int8_ops_s < card.int8_ops_s
        assert profile.attention_ops_s < card.int8_ops_s
        assert profile.pinned_limit_bytes == 8 * 2**30
        assert (profile.gemm_fp8_ops_s is None) == (card.fp8_ops_s is None)
    assert find_card(REFERENCE_CARD)


@pytest.mark.parametrize(
    ("architecture", "arch"),
    [
        ("ampere", "sm_86"),
        ("ada", "sm_89"),
        ("blackwell", "sm_120"),
        ("a100", "sm_80"),
        ("hopper", "sm_90"),
    ],
)
def test_shares_are_those_that_the_machine_code_predicts(architecture: str, arch: str) -> None:
    shares = static_bound.shares(static_bound.read_table(), arch)
    row = ACHIEVABLE[architecture]
    assert (row.gemm_int8, row.gemm_fp8, row.attention) == (
        shares["gemm_int8"],
        shares.get("gemm_fp8"),
        shares["attention"],
    )
    assert row.basis == "predicted"


def test_predictions_are_near_what_was_published_of_other_kernels() -> None:
    """kernels 2.7 and 6: attention of SageAttention 1 on a 4090 and a 3090, whose bound is three
    quarters of lowvram's; row-wise fp8 in Triton on an H100, from above.
    """
    rates = {name: find_card(name).profile() for name in ("RTX 4090", "RTX 3090", "H200")}
    assert rates["RTX 4090"].attention_ops_s == pytest.approx(1.33 * 322e12, rel=0.05)
    assert rates["RTX 3090"].attention_ops_s == pytest.approx(1.33 * 135e12, rel=0.05)
    assert rates["H200"].gemm_fp8_ops_s is not None
    assert 0.5 * 1190e12 < rates["H200"].gemm_fp8_ops_s < 1190e12


def test_what_the_user_names_is_no_assumption_of_the_table() -> None:
    profile = find_card("RTX 3090").profile(
        link_bytes_s=parse_link("PCIe 3.0 x8"), disk_bytes_s=parse_speed("7GB")
    )
    assert (profile.link_bytes_s, profile.disk_bytes_s) == (6e9, 7e9)
    assert profile.sources["link_bytes_s"] == profile.sources["disk_bytes_s"] == "given"
    assert profile.basis == "predicted"


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("PCIe 3.0 x16", 12e9),
        ("pcie 4 x16", 25e9),
        ("5.0x16", 50e9),
        ("gen4 x8", 12.5e9),
        ("PCIE4.0X4", 6.25e9),
        ("12GB/s", 12e9),
        ("900 MB", 0.9e9),
    ],
)
def test_links(text: str, speed: float) -> None:
    assert parse_link(text) == pytest.approx(speed)


@pytest.mark.parametrize("text", ["PCIe 9.0 x16", "PCIe 4.0 x3", "fast", "", "0GB", "-1GB"])
def test_links_that_are_none(text: str) -> None:
    with pytest.raises(
        UsageError,
        match=r'such as "PCIe 4.0 x8"|like "PCIe 4.0 x8", or give the bytes per second like 12GB',
    ):
        parse_link(text)


@pytest.mark.parametrize("text", ["PCIe 4.0 x4", "fast", "", "0GB", "-1GB"])
def test_disks_that_are_none(text: str) -> None:
    """A link is none, and is not what is advised."""
    with pytest.raises(
        UsageError, match=r"give the bytes that the disk reads per second, like 3\.5GB"
    ) as refused:
        parse_speed(text)
    assert "PCIe" not in str(refused.value).replace(repr(text), "")


@pytest.mark.parametrize(
    ("gib", "name"),
    [
        (0, REFERENCE_CARD),
        (24, REFERENCE_CARD),
        (25, "RTX 5090"),
        (33, "A100 40GB"),
        (41, "A100 80GB"),
        (4096, "H200"),
    ],
)
def test_a_budget_without_a_card_is_that_of_one_that_has_it(gib: int, name: str) -> None:
    assert card_with(gib * 2**30).name == name
