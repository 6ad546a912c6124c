"""Writes docs/plans.md and docs/streaming.md, all of it predicted: what runs within which budgets,
and where streaming is hidden.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lowvram.cli.progress import duration
from lowvram.errors import BudgetError
from lowvram.formats import FORMATS
from lowvram.planner.choose import choose_plan
from lowvram.planner.phases import Host, PlanChoice
from lowvram.planner.plan import MemoryPlan
from lowvram.plans.api import plan as plan_for_card
from lowvram.request import Workload
from lowvram.timing.cards import COMPUTE_CAPABILITIES, LANE_BYTES_S, Card, find_card
from lowvram.timing.forecast import Forecast, simulate_choice
from lowvram.timing.predict import attention_ops, block_seconds, linear_ops, text_ops
from lowvram.timing.simulate import HopSpeeds
from lowvram.units import format_memory
from lowvram.variants import I2V_A14B, T2V_A14B, ModelConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMAND = "python -m scripts.plans"
SIZES = ((832, 480), (1280, 720))
FRAMES = 81
VRAM_GB, RAM_GB = (24, 16, 12, 8, 6), (64, 32, 16, 8)
CARDS = ("RTX 3060 12GB", "RTX 4090")
DIT, BLOCKS = T2V_A14B.dit, T2V_A14B.dit.num_layers
INT8_BYTES = 351_272_960  # of a block's matrices, as docs/facts/kernels.md section 5 counts them
# a step that takes at most this much longer than with resident blocks (design section 1, item 2)
HIDDEN = 0.02


@dataclass(frozen=True)
class Assumed:
    """One row of the table of docs/facts/kernels.md section 5: rates in TOPS, and its own
    thresholds over PCIe 3, 4 and 5.
    """

    name: str
    gemm: float
    attention: float
    facts: tuple[int | None, ...]


# The facts name no rates for the 5090's realistic row; 550 beside its published attention of 479
# gives all three of its thresholds.
SECTION_5 = (
    Assumed("4090 limit, all 8-bit", 660, 660, (19_424, 11_217, 6_373)),
    Assumed("4090 realistic (400 / 322)", 400, 322, (12_712, 7_198, 4_015)),
    Assumed("4090 bf16 compute", 165, 165, (6_592, 3_467, 1_825)),
    Assumed("3090 limit (284 / 189)", 284, 189, (9_383, 5_256, None)),
    Assumed("3090 realistic (180 / 134)", 180, 134, (6_730, 3_626, None)),
    Assumed("5090 limit", 838, 838, (22_967, 13_476, 7_777)),
    Assumed("5090 realistic (550 / 479)", 550, 479, (16_380, 9_430, 5_342)),
    Assumed("H200 limit", 1979, 1979, (40_558, 25_039, None)),
    Assumed("H200 realistic (1200 / 880)", 1200, 880, (26_344, 16_099, None)),
)
GENERATIONS = (3, 4, 5)
CLIPS = (
    ("640x384 x 33", 8_640),
    ("832x480 x 33", 14_040),
    ("832x480 x 49", 20_280),
    ("832x480 x 81", 32_760),
    ("1280x720 x 81", 75_600),
)
README_CARDS = (
    "RTX 4060 8GB",
    "RTX 3080 10GB",
    "RTX 3060 12GB",
    "RTX 4070",
    "RTX 4060 Ti 16GB",
    "RTX 5080",
    "RTX 3090",
    "RTX 4090",
    "RTX 5090",
)
CARDS_BEGIN, CARDS_END = "<!-- cards: begin -->", "<!-- cards: end -->"
STREAMED_CARDS = ("RTX 3060 12GB", "RTX 3090", "RTX 4060 8GB", "RTX 4090", "RTX 5090", "H200")


# docs/plans.md


def plan_of(
    config: ModelConfig, card: Card, size: tuple[int, int], vram_gb: int, ram_gb: int
) -> MemoryPlan | BudgetError:
    """The plan that `lowvram plan` makes for a card under two budgets, or why there is none."""
    ram_bytes = ram_gb * 2**30
    profile = card.profile(ram_bytes)
    workload = Workload.of(config, "int8", size, FRAMES)
    budgets = vram_gb * 2**30, ram_bytes
    try:
        return choose_plan(
            workload,
            Host.of("cuda", architecture=COMPUTE_CAPABILITIES.get(card.architecture, "")),
            *budgets,
            clock=Forecast(workload, profile),
            pinned_limit_bytes=profile.pinned_limit_bytes,
        )
    except BudgetError as error:
        return error


def plan_row(config: ModelConfig, size: tuple[int, int], vram_gb: int, ram_gb: int) -> str:
    """One line: peaks and where the blocks lie, of the plan for the first card that has the VRAM,
    and the times of all that have it.
    """
    cards = [find_card(name) for name in CARDS]
    plans = [
        plan_of(config, card, size, vram_gb, ram_gb) if card.vram_bytes >= vram_gb * 2**30 else None
        for card in cards
    ]
    first = next(plan for plan in plans if plan is not None)
    cells = [f"{vram_gb} GiB", f"{ram_gb} GiB"]
    if isinstance(first, BudgetError):
        return _line([*cells, "does not fit", *["-"] * (3 + 2 * len(CARDS))])
    choice = first.choice
    from_disk = first.num_blocks - choice.resident_blocks - choice.host_blocks
    cells += [format_memory(first.peak_vram_bytes), format_memory(first.peak_ram_bytes)]
    cells += [
        f"{choice.resident_blocks} / {choice.host_blocks} ({choice.pinned_blocks}) / {from_disk}",
        f"{choice.chunk_tokens}",
    ]
    for plan in plans:
        prediction = plan.prediction if isinstance(plan, MemoryPlan) else None
        cells += (
            [f"{prediction.step_s:.1f} s", duration(prediction.video_s)]
            if prediction
            else ["-", "-"]
        )
    return _line(cells)


def plans_document() -> str:
    lines = [
        "# What runs within which budgets",
        "",
        f"Written by `{COMMAND}` from the planner: int8, 40 steps, two guidance branches, {FRAMES} frames. Peaks are computed before a",
        "run, and the run keeps to them. **All times are predictions** from the table of cards (`lowvram/timing/cards.py`): data-sheet peaks, and",
        "the shares of them that the kernels' machine code predicts (`docs/benchmarks/kernels.md`). None was measured. Weights that are in",
        "neither VRAM nor RAM come from a disk of 3.5 GB/s. For other cards, links and disks, use",
        "`lowvram plan VARIANT --gpu CARD --size … --vram … --ram …`.",
        "",
        "Blocks: of one expert's 40, how many stay in VRAM / stay in RAM (how many of these are page-locked: at most half of the RAM budget) /",
        "come from disk at every visit. Peaks, blocks and chunk (in tokens) are those of the plan for the first of",
        f"{' and '.join(CARDS)} that has the VRAM; `-` means that the card has less. The time of a video covers all phases except writing",
        "the file. Image to video can be planned but not run yet; encoding the image is not counted, neither its time nor its memory.",
    ]
    head = ["VRAM", "RAM", "peak VRAM", "peak RAM", "blocks", "chunk"]
    head += [f"{name}: {what}, predicted" for name in CARDS for what in ("a step", "a video")]
    for config in (T2V_A14B, I2V_A14B):
        for size in SIZES:
            lines += [
                "",
                f"## {config.variant}, {size[0]}x{size[1]} x {FRAMES}",
                "",
                _line(head),
                _rule(len(head)),
            ]
            lines += [plan_row(config, size, vram, ram) for vram in VRAM_GB for ram in RAM_GB]
    return "\n".join(lines) + "\n"


# docs/streaming.md


def steady_overhead(
    compute_s: float, block_bytes: float, speeds: HopSpeeds, choice: PlanChoice, rounds: int = 2
) -> float:
    """How much longer the third of three steps takes than computing alone, as a share."""
    length = rounds * BLOCKS
    schedule = [("high_noise", index) for _ in range(3 * rounds) for index in range(BLOCKS)]
    timeline = simulate_choice(
        schedule, choice, int(block_bytes), compute_s, speeds, 2, [length] * 3
    )
    third = timeline.visits[-1].compute_end_s - timeline.visits[-1 - length].compute_end_s
    return third / (length * compute_s) - 1


IN_RAM = PlanChoice(8192, 2, 0, BLOCKS, False, BLOCKS)
ON_DISK = PlanChoice(8192, 2, 0, 0, False)


def first_hidden(hidden_at: Callable[[int], bool], low: int = 64, high: int = 200_000) -> int:
    """The smallest number of tokens at which `hidden_at` holds; it holds from there on."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if hidden_at(middle) else (middle + 1, high)
    return low


def bare_seconds(row: Assumed, tokens: int) -> float:
    """A block's linears and attention at fixed rates, as kernels.md section 5 counts them: no
    element-wise work.
    """
    attention = attention_ops(DIT, tokens, tokens) + attention_ops(DIT, tokens, DIT.text_len)
    return ((linear_ops(DIT, tokens) + text_ops(DIT)) / row.gemm + attention / row.attention) / 1e12


def threshold(row: Assumed, generation: int) -> int:
    """Tokens from which the simulated streamer hides copies out of page-locked RAM to a
    thousandth.
    """
    speeds = HopSpeeds(1e15, 1e15, LANE_BYTES_S[generation] * 16)
    return first_hidden(
        lambda tokens: (
            steady_overhead(bare_seconds(row, tokens), INT8_BYTES, speeds, IN_RAM) <= 1e-3
        )
    )


def closed_form(row: Assumed, generation: int) -> int:
    """Tokens from which a block computes longer than it travels."""
    return first_hidden(lambda tokens: bare_seconds(row, tokens) >= travel_seconds(generation))


def travel_seconds(generation: int) -> float:
    """A block's way over 16 lanes."""
    return INT8_BYTES / (LANE_BYTES_S[generation] * 16)


def more_of_the_facts() -> tuple[float, float]:
    """By which share the thresholds of the facts lie above the closed form: the least and the most
    of all.
    """
    shares = [
        facts / closed_form(row, generation) - 1
        for row in SECTION_5
        for generation, facts in zip(GENERATIONS, row.facts, strict=True)
        if facts
    ]
    return min(shares), max(shares)


def card_seconds(card: Card, tokens: int) -> float:
    return block_seconds(DIT, FORMATS["int8"], tokens, 8192, card.profile()) or 0.0


def card_overhead(
    card: Card, tokens: int, link_bytes_s: float, disk_bytes_s: float | None, joint: bool
) -> float:
    """The overhead of streaming every block out of page-locked RAM, or off a disk, through two
    slots.
    """
    speeds = HopSpeeds(disk_bytes_s or 1e15, 10e9, link_bytes_s)
    choice = ON_DISK if disk_bytes_s else IN_RAM
    seconds = card_seconds(card, tokens) * (2 if joint else 1)
    return steady_overhead(seconds, INT8_BYTES, speeds, choice, 1 if joint else 2)


def threshold_row(row: Assumed) -> str:
    cells = [row.name]
    for generation, facts in zip(GENERATIONS, row.facts, strict=True):
        cells += [
            f"{facts:,}" if facts else "-",
            f"{closed_form(row, generation):,}",
            f"{threshold(row, generation):,}",
        ]
    return _line(cells)


def hidden_row(name: str) -> str:
    card = find_card(name)
    cells = [name, f"PCIe {card.pcie_generation}.0 x{card.pcie_lanes}"]

    def hidden(disk: float | None, joint: bool, tokens: int) -> bool:
        return card_overhead(card, tokens, card.link_bytes_s, disk, joint) <= HIDDEN

    for disk in (None, 7e9, 3.5e9):
        for joint in (False, True):
            cells.append(f"{first_hidden(partial(hidden, disk, joint)):,}")
    return _line(cells)


def overhead_rows(name: str) -> list[str]:
    card = find_card(name)
    ways = (
        (f"RAM, PCIe {card.pcie_generation}.0 x{card.pcie_lanes}", card.link_bytes_s, None),
        ("RAM, PCIe 3.0 x8", LANE_BYTES_S[3] * 8, None),
        ("disk, 7 GB/s", card.link_bytes_s, 7e9),
        ("disk, 3.5 GB/s", card.link_bytes_s, 3.5e9),
    )
    rows = []
    for way, link, disk in ways:
        overheads = [
            min(card_overhead(card, tokens, link, disk, joint) for joint in (False, True))
            for _, tokens in CLIPS
        ]
        rows.append(
            _line(
                [name, way, *("hidden" if share <= 5e-4 else f"{share:.1%}" for share in overheads)]
            )
        )
    return rows


def streaming_document() -> str:
    least, most = more_of_the_facts()
    head = ["compute assumed (TOPS)"]
    for generation in GENERATIONS:
        head += [f"PCIe {generation}.0 x16: facts", "closed form", "simulated"]
    lines = [
        "# Where streaming is hidden",
        "",
        f"Written by `{COMMAND}` from the timing model (`lowvram/timing/simulate.py`). Tests compare the model with the real streamer's",
        "threads on a simulated clock, event by event. **Every number here is a prediction**; none was measured on a GPU.",
        "",
        "## Compared with the closed form",
        "",
        "The number of tokens from which streaming int8 blocks from page-locked RAM costs nothing. Facts: the table of `docs/facts/kernels.md`,",
        "section 5. Closed form: a block takes longer to compute than to transfer, counting its linears and both attentions. The facts leave out",
        f"cross-attention and the text's keys and values, hence their {least:.1%} to {most:.1%} more tokens. Simulated: a step of the streamer with two slots",
        "and no resident block takes at most 0.1 % longer. It agrees with the closed form, so two slots suffice where all blocks take the same path.",
        "",
        _line(head),
        _rule(len(head)),
        *(threshold_row(row) for row in SECTION_5),
        "",
        "## With everything counted",
        "",
        f"The number of tokens from which a step takes at most {HIDDEN:.0%} longer than with resident blocks, at the predicted rates of the table of",
        "cards, with element-wise work and kernel launches counted; no resident block, two slots. `joint`: both guidance branches share a visit",
        "of a block. The numbers come in steps of 128, because a tile of queries also computes what lies beyond the last token.",
        "",
        _line(
            ["card", "link", "RAM", "RAM, joint", "disk 7 GB/s", "joint", "disk 3.5 GB/s", "joint"]
        ),
        _rule(8),
        *(hidden_row(name) for name in STREAMED_CARDS),
        "",
        "## What streaming costs where it is not hidden",
        "",
        "How much longer a step takes than with resident blocks when **no** block is resident, with separate or joint visits, whichever is",
        "faster. The planner keeps blocks resident wherever VRAM is left, and each resident block lowers these costs.",
        "",
        _line(["card", "weights come from", *(name for name, _ in CLIPS)]),
        _rule(2 + len(CLIPS)),
        *(row for name in STREAMED_CARDS for row in overhead_rows(name)),
        "",
        '`lowvram plan VARIANT --gpu CARD --link "PCIe 3.0 x8" --disk 3.5GB` answers for one machine and its budgets.',
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def readme_cards() -> str:
    """The README's table of cards, between its two markers."""
    lines = [
        "Predicted, not measured: int8, 81 frames, 40 steps with guidance, 16 GiB of RAM, from data "
        "sheets and the kernels'",
        "machine code. `lowvram plan t2v-a14b --gpu NAME` predicts other cards, sizes and budgets.",
        "",
        _line(["card", "peak VRAM, 480p", "a video, 480p", "peak VRAM, 720p", "a video, 720p"]),
        _rule(5),
    ]
    for name in README_CARDS:
        cells = [name]
        for size in SIZES:
            plan = plan_for_card("t2v-a14b", size=size, gpu=name, ram="16GB")
            if plan.prediction is None:
                raise ValueError(f"{name}: no prediction")
            minutes = round(plan.prediction.video_s / 60)
            cells += [format_memory(plan.peak_vram_bytes), f"{minutes} min"]
        lines.append(_line(cells))
    return "\n".join(lines)


def with_cards(text: str) -> str:
    """The README with its table of cards as the planner says now."""
    before, rest = text.split(CARDS_BEGIN)
    after = rest.split(CARDS_END)[1]
    return f"{before}{CARDS_BEGIN}\n{readme_cards()}\n{CARDS_END}{after}"


def _rule(columns: int) -> str:
    return _line(["---"] + ["--:"] * (columns - 1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where a document is not what this would write",
    )
    check = parser.parse_args(arguments).check
    stale = False
    readme = DOCS.parent / "README.md"
    documents = (
        (DOCS / "plans.md", plans_document()),
        (DOCS / "streaming.md", streaming_document()),
        (readme, with_cards(readme.read_text(encoding="utf-8"))),
    )
    for path, document in documents:
        if check:
            current = path.read_text(encoding="utf-8") if path.exists() else ""
            if current != document:
                stale = True
                print(f"{path} is not what the planner says now: run {COMMAND}")
        else:
            path.write_text(document, encoding="utf-8")
            print(path)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
