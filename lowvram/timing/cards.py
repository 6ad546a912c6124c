"""Table of GPUs: peak rates from data sheets, and the shares that lowvram is expected to reach.

Nothing here was measured by lowvram. Peaks of GeForce cards follow from cores and boost clock, as
in NVIDIA's architecture papers: dense tensor rates with exact accumulation are 2 (bf16), 4 (fp8)
and 8 (int8) times the fp32 rate of 2 operations per core and clock, which gives the peaks of
`docs/facts/kernels.md` section 5 (3090: 71 and 284; 4090: 165, 330 and 660; 5090: 209 and 838).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from lowvram.errors import UsageError
from lowvram.hardware.profile import GIVEN, PINNED_SHARE, PREDICTED, TABLE, MachineProfile
from lowvram.units import parse_bytes

GIB = 2**30
# Card for predictions when none is named or measured (`card_with`).
REFERENCE_CARD = "RTX 4090"
# Host to device from pinned memory, in bytes/s per lane, by PCIe generation; generations 3 to 5
# give 12, 25 and 50 GB/s over 16 lanes (kernels 5).
LANE_BYTES_S = {2: 0.375e9, 3: 0.75e9, 4: 1.5625e9, 5: 3.125e9}
DISK_BYTES_S = 3.5e9  # an NVMe disk (design section 1)
HOST_COPY_BYTES_S = 10e9  # a copy within host memory by one thread
RAM_BYTES = 32 * GIB  # default RAM of a machine with a card of the table
ELEMENTWISE_SHARE = 0.9  # of the memory bandwidth (kernels 5)
# Of the bf16 peak: cuDNN's 3-D convolutions run in TF32, whose peak is half of bf16's, and are
# assumed to reach half of that, without a source.
CONV_SHARE = 0.25


@dataclass(frozen=True)
class Achievable:
    """Expected shares of a card's dense peak rates, not measured by lowvram.

    gemm_int8, gemm_fp8: linears, as a share of the peak of the same type.
    attention: lowvram's attention, as a share of the int8 peak.
    bf16, attention_bf16: kernels of the libraries, as a share of the bf16 peak.
    basis: origin of the first three: `PREDICTED` from machine code (docs/benchmarks/kernels.md,
    "Bounds from machine code"), or `TABLE` if assumed.
    source: origin of the other two, by section of docs/facts/kernels.md.
    """

    gemm_int8: float
    gemm_fp8: float | None
    attention: float
    bf16: float
    attention_bf16: float
    basis: str
    source: str


# The first three of each row are the `shares` of `scripts/static_bound.py`; a test compares them.
ACHIEVABLE = {
    "ampere": Achievable(
        0.659, None, 0.634, 0.85, 0.95, PREDICTED, "2.7: FA2 68-71 of 71 on a 3090"
    ),
    "ada": Achievable(0.659, 0.676, 0.65, 0.85, 0.95, PREDICTED, "2.7: FA2 164 of 165 on a 4090"),
    "blackwell": Achievable(
        0.662, 0.695, 0.77, 0.85, 0.95, PREDICTED, "2.7: FA2 214 of 209 on a 5090"
    ),
    "a100": Achievable(0.599, None, 0.564, 0.85, 0.65, PREDICTED, "2.7: FA2 204 of 312 on an A100"),
    "hopper": Achievable(
        0.611, 0.494, 0.339, 0.85, 0.47, PREDICTED, "2.7: attention in Triton 465 of 989 on an H100"
    ),
    "rdna3": Achievable(
        0.4, None, 0.3, 0.5, 0.3, TABLE, "no published number: an assumption without a source"
    ),
}


# Compute capabilities whose kernels differ in what they store; see `sizes.values_name`.
COMPUTE_CAPABILITIES = {"hopper": "sm_90"}


@dataclass(frozen=True)
class Card:
    """Data sheet of one card: dense peak rates with exact accumulation.

    fp8_ops_s: None if the tensor cores have no fp8.
    """

    name: str
    architecture: str
    vram_bytes: int
    int8_ops_s: float
    fp8_ops_s: float | None
    bf16_ops_s: float
    bandwidth_bytes_s: float
    pcie_generation: int
    pcie_lanes: int

    @property
    def link_bytes_s(self) -> float:
        """Speed of copies from pinned host memory to the card, in bytes/s."""
        return LANE_BYTES_S[self.pcie_generation] * self.pcie_lanes

    def profile(
        self,
        ram_bytes: int = RAM_BYTES,
        link_bytes_s: float | None = None,
        disk_bytes_s: float | None = None,
    ) -> MachineProfile:
        """Predicted speeds of a machine with this card.

        link_bytes_s, disk_bytes_s: given by the user instead of the table's values.
        """
        share = ACHIEVABLE[self.architecture]
        profile = MachineProfile(
            name=self.name,
            device="cuda",
            link_bytes_s=link_bytes_s or self.link_bytes_s,
            disk_bytes_s=disk_bytes_s or DISK_BYTES_S,
            host_copy_bytes_s=HOST_COPY_BYTES_S,
            gemm_int8_ops_s=self.int8_ops_s * share.gemm_int8,
            gemm_fp8_ops_s=self.fp8_ops_s * share.gemm_fp8
            if self.fp8_ops_s and share.gemm_fp8
            else None,
            gemm_bf16_ops_s=self.bf16_ops_s * share.bf16,
            attention_ops_s=self.int8_ops_s * share.attention,
            attention_bf16_ops_s=self.bf16_ops_s * share.attention_bf16,
            conv_ops_s=self.bf16_ops_s * CONV_SHARE,
            elementwise_bytes_s=self.bandwidth_bytes_s * ELEMENTWISE_SHARE,
            vram_total_bytes=self.vram_bytes,
            vram_free_bytes=self.vram_bytes,
            ram_total_bytes=ram_bytes,
            pinned_limit_bytes=int(ram_bytes * PINNED_SHARE),
        )
        sources = dict.fromkeys(
            (name for name in profile.to_dict() if name.endswith(("_s", "_bytes"))), TABLE
        )
        sources |= dict.fromkeys(
            ("gemm_int8_ops_s", "gemm_fp8_ops_s", "attention_ops_s"), share.basis
        )
        sources |= {"link_bytes_s": GIVEN} if link_bytes_s else {}
        sources |= {"disk_bytes_s": GIVEN} if disk_bytes_s else {}
        return replace(profile, sources=sources)


def _geforce(
    name: str,
    architecture: str,
    gib: int,
    cores: int,
    boost_mhz: int,
    bandwidth_gb_s: float,
    generation: int,
    lanes: int,
) -> Card:
    fp32 = 2.0 * cores * boost_mhz * 1e6
    fp8 = None if architecture == "ampere" else 4 * fp32
    return Card(
        name,
        architecture,
        gib * GIB,
        8 * fp32,
        fp8,
        2 * fp32,
        bandwidth_gb_s * 1e9,
        generation,
        lanes,
    )


CARDS = (
    _geforce("RTX 3060 12GB", "ampere", 12, 3584, 1777, 360, 4, 16),
    _geforce("RTX 3060 Ti", "ampere", 8, 4864, 1665, 448, 4, 16),
    _geforce("RTX 3070", "ampere", 8, 5888, 1725, 448, 4, 16),
    _geforce("RTX 3080 10GB", "ampere", 10, 8704, 1710, 760, 4, 16),
    _geforce("RTX 3080 12GB", "ampere", 12, 8960, 1710, 912, 4, 16),
    _geforce("RTX 3090", "ampere", 24, 10496, 1695, 936, 4, 16),
    _geforce("RTX 4060 8GB", "ada", 8, 3072, 2460, 272, 4, 8),
    _geforce("RTX 4060 Ti 8GB", "ada", 8, 4352, 2535, 288, 4, 8),
    _geforce("RTX 4060 Ti 16GB", "ada", 16, 4352, 2535, 288, 4, 8),
    _geforce("RTX 4070", "ada", 12, 5888, 2475, 504, 4, 16),
    _geforce("RTX 4070 Super", "ada", 12, 7168, 2475, 504, 4, 16),
    _geforce("RTX 4070 Ti", "ada", 12, 7680, 2610, 504, 4, 16),
    _geforce("RTX 4070 Ti Super", "ada", 16, 8448, 2610, 672, 4, 16),
    _geforce("RTX 4080", "ada", 16, 9728, 2505, 716.8, 4, 16),
    _geforce("RTX 4080 Super", "ada", 16, 10240, 2550, 736, 4, 16),
    _geforce("RTX 4090", "ada", 24, 16384, 2520, 1008, 4, 16),
    # boost at 115 W; 1470 MHz at 35 W
    _geforce("RTX 4060 Laptop", "ada", 8, 3072, 2370, 256, 4, 8),
    # boost at 115 W; 1230 MHz at 35 W
    _geforce("RTX 4070 Laptop", "ada", 8, 4608, 2175, 256, 4, 8),
    _geforce("RTX 5060 Ti 8GB", "blackwell", 8, 4608, 2572, 448, 5, 8),
    _geforce("RTX 5060 Ti 16GB", "blackwell", 16, 4608, 2572, 448, 5, 8),
    _geforce("RTX 5070", "blackwell", 12, 6144, 2512, 672, 5, 16),
    _geforce("RTX 5070 Ti", "blackwell", 16, 8960, 2452, 896, 5, 16),
    _geforce("RTX 5080", "blackwell", 16, 10752, 2617, 960, 5, 16),
    _geforce("RTX 5090", "blackwell", 32, 21760, 2407, 1792, 5, 16),
    Card("A100 40GB", "a100", 40 * GIB, 624e12, None, 312e12, 1555e9, 4, 16),
    Card("A100 80GB", "a100", 80 * GIB, 624e12, None, 312e12, 2039e9, 4, 16),
    Card("H100 80GB", "hopper", 80 * GIB, 1979e12, 1979e12, 989e12, 3350e9, 5, 16),
    Card("H200", "hopper", 141 * 10**9, 1979e12, 1979e12, 989e12, 4800e9, 5, 16),
    Card("RX 7900 XTX", "rdna3", 24 * GIB, 122.8e12, None, 122.8e12, 960e9, 4, 16),
)


def find_card(name: str) -> Card:
    """Find a card by name; case, spaces, hyphens and makers' names are ignored.

    The memory size may be left out if only one card has the name. Raises `UsageError` for an
    unknown name, listing similar names, and for an ambiguous one, listing all matches.
    """
    wanted = _plain(name)
    for of in (_plain, _family):
        found = [card for card in CARDS if of(card.name) == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{name!r} may be {_listed(found)}: add the memory size")
    close = difflib.get_close_matches(
        wanted, [_plain(card.name) for card in CARDS], n=4, cutoff=0.5
    )
    near = [card for card in CARDS if _plain(card.name) in close]
    raise UsageError(f"no card {name!r} in the table: use {_listed(near or CARDS)}")


def card_with(vram_bytes: int) -> Card:
    """Card of the table with at least `vram_bytes` of VRAM.

    `REFERENCE_CARD` if it is large enough, else the smallest that is, else the largest card.
    """
    large_enough = [card for card in CARDS if card.vram_bytes >= vram_bytes]
    reference = find_card(REFERENCE_CARD)
    if reference in large_enough:
        return reference
    return (
        min(large_enough, key=lambda card: card.vram_bytes)
        if large_enough
        else max(CARDS, key=lambda card: card.vram_bytes)
    )


def parse_link(text: str) -> float:
    """Parse the speed of a link into bytes/s: `PCIe 4.0 x16`, `4.0x8`, `gen3 x16` or `12GB/s`.

    Raises `UsageError`.
    """
    match = re.fullmatch(
        r"\s*(?:pcie|pci-e|gen)?\s*(?:gen)?\s*(\d)(?:\.0)?\s*x\s*(\d+)\s*", text.lower()
    )
    if match is None:
        return _speed(
            text,
            'write it like "PCIe 4.0 x8", or give the bytes per second like 12GB',
        )
    generation, lanes = int(match[1]), int(match[2])
    if generation not in LANE_BYTES_S or lanes not in (1, 2, 4, 8, 16):
        known = ", ".join(f"{number}.0" for number in LANE_BYTES_S)
        raise UsageError(
            f'no link {text!r}: PCIe {known} with 1, 2, 4, 8 or 16 lanes, such as "PCIe 4.0 x8"'
        )
    return LANE_BYTES_S[generation] * lanes


def parse_speed(text: str) -> float:
    """Parse the speed of a disk into bytes/s: `3.5GB` or `3.5 GB/s`. Raises `UsageError`."""
    return _speed(text, "give the bytes that the disk reads per second, like 3.5GB")


def _speed(text: str, advice: str) -> float:
    amount = re.sub(r"\s*(/\s*s|ps)\s*$", "", text.strip(), flags=re.IGNORECASE)
    try:
        speed = parse_bytes(amount)
    except UsageError as error:
        raise UsageError(f"invalid speed {text!r}: {advice}") from error
    if speed < 1:
        raise UsageError(f"speed {text!r} is not positive: {advice}")
    return float(speed)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|amd|radeon|gpu|[^a-z0-9]", "", name.lower())


def _family(name: str) -> str:
    """Name of a card without its memory size."""
    return _plain(re.sub(r"\s+\d+GB$", "", name))


def _listed(cards: tuple[Card, ...] | list[Card]) -> str:
    return ", ".join(card.name for card in cards)
