"""The last page of `bench all`: what machine it was, how each step ended, and which goals are
met, missed or not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.bench.results import Record, problem_of, row_key

if TYPE_CHECKING:
    from scripts.bench.run_all import Outcome, Step

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
LINEAR_GOAL, ATTENTION_GOAL, BLOCK_GOAL, ROWS_GOAL, TILE_GAIN = 1.6, 1.3, 1.6, 0.8, 0.02
OURS = "lowvram int8"
OUR_ATTENTION = "lowvram int8, PV int8"
INT8_PEERS = ("torch._int_mm", "comfy-kitchen")
STREAM_GOALS = ("overhead", "ram", "prediction", "switch", "diffusers")


@dataclass(frozen=True)
class Verdict:
    """How one goal stands. number: what was measured and the row that decides it, or why nothing
    was.
    """

    goal: str
    result: str
    number: str


def page(
    records: Sequence[Record],
    outcomes: Sequence[Outcome],
    steps: Sequence[Step],
    rehearsal: bool = False,
) -> str:
    """Markdown. records: of all calls whose rows count, earlier ones first; those of another
    machine or other code are left out.
    """
    rows = rows_that_count(records)
    facts = rows[-1] if rows else {}
    lines = ["# `bench all`", ""]
    if rehearsal:
        lines += [
            "**A rehearsal on a CPU:** it shows that the benchmark runs and says nothing "
            "about any GPU.",
            "",
        ]
    if facts:
        versions = f"torch {facts['torch']}, Triton {facts['triton']}"
        lines += [
            f"{facts['gpu']}, {versions}, commit {facts['commit']}, source {facts['source']}.",
            "",
        ]
    lines += ["| step | | seconds | |", "|---|---|--:|---|"]
    ran = {outcome.step.name: outcome for outcome in outcomes}
    for step in steps:
        outcome = ran.get(step.name)
        measured = sum(row["step"] == step.name for row in rows)
        cells = (
            (outcome.status, f"{outcome.seconds:.0f}", outcome.reason)
            if outcome
            else ("not run", "", "")
        )
        lines.append(
            f"| {step.name}: {step.title} | {cells[0]} | {cells[1]} | "
            f"{with_count(cells[2], measured)} |"
        )
    lines += ["", "| goal | | measured |", "|---|---|---|"]
    lines += [
        f"| {verdict.goal} | {verdict.result} | {verdict.number.replace('|', '/')} |"
        for verdict in verdicts(rows)
    ]
    return "\n".join(lines) + "\n"


def with_count(reason: str, measured: int) -> str:
    reason = reason.replace("|", ";")
    rows = f"{measured} row{'' if measured == 1 else 's'}"
    return f"{rows}; {reason}" if reason else rows


def rows_that_count(records: Sequence[Record]) -> list[Record]:
    """The measured rows of the machine and the code that the last record is of; of two with one key
    the later.
    """
    if not records:
        return []
    identity = records[-1]["identity"]
    found = [
        record for record in records if record["event"] == "row" and record["identity"] == identity
    ]
    return list({row_key(row): row for row in found}.values())


def verdicts(rows: Sequence[Record]) -> list[Verdict]:
    wrong = {
        row["op"]: row["problem"] for row in rows if row["step"] == "correct" and row.get("problem")
    }
    found = [judge(rows) for judge in (kernels_agree, tests_pass)]
    for tokens in (32760, 75600):
        found += [
            linears(rows, tokens, wrong),
            linears_and_int8_peers(rows, tokens, wrong),
            attention(rows, tokens, wrong),
        ]
    found += [sage(rows, wrong), elementwise(rows, wrong), block(rows)]
    return [*found, same_latents(rows), *streaming(rows), same_frames(rows), tiles(rows)]


def kernels_agree(rows: Sequence[Record]) -> Verdict:
    goal = "every kernel agrees with its reference"
    checks = [row for row in rows if row["step"] == "correct" and "problem" in row]
    ops = {row["op"] for row in checks}
    wrong = [row for row in checks if row["problem"]]
    if not checks:
        return Verdict(goal, UNKNOWN, "no kernel was checked")
    bad = {row["op"] for row in wrong}
    number = f"{len(ops - bad)} of {len(ops)} in {len(checks)} calls"
    named = [f"{row['op']}, {row['name']}: {row['problem']}" for row in wrong[:3]]
    return Verdict(goal, MISSED if wrong else MET, "; ".join([number, *named]))


def tests_pass(rows: Sequence[Record]) -> Verdict:
    goal = "the tests on a GPU pass"
    runs = [row for row in rows if row["step"] == "correct" and "passed" in row]
    passed, failed = (sum(row[name] for row in runs) for name in ("passed", "failed"))
    if not passed and not failed:
        return Verdict(goal, UNKNOWN, "no test ran")
    failures = [failure for row in runs for failure in row["failures"]]
    return Verdict(
        goal,
        MISSED if failed else MET,
        "; ".join([f"{passed} passed, {failed} failed in {len(runs)} parts", *failures[:3]]),
    )


def linears(rows: Sequence[Record], tokens: int, wrong: dict[str, str]) -> Verdict:
    goal = f"int8 linears at {tokens:,} tokens take 1/{LINEAR_GOAL} of torch's bf16"
    found = pairs(rows, f"M={tokens} ", "linear", OURS, lambda name: name == "torch bf16")
    return worst_ratio(goal, LINEAR_GOAL, found, wrong.get("quantized_linear"))


def linears_and_int8_peers(rows: Sequence[Record], tokens: int, wrong: dict[str, str]) -> Verdict:
    goal = f"int8 linears at {tokens:,} tokens are ahead of every other int8 path"
    found = pairs(rows, f"M={tokens} ", "linear", OURS, lambda name: name.startswith(INT8_PEERS))
    return worst_ratio(goal, 1.0, found, wrong.get("quantized_linear"))


def attention(rows: Sequence[Record], tokens: int, wrong: dict[str, str]) -> Verdict:
    goal = f"attention over {tokens:,} keys takes 1/{ATTENTION_GOAL} of the fastest SDPA"
    found = pairs(
        rows, f" {tokens} keys", "attention", OUR_ATTENTION, lambda name: name.startswith("SDPA")
    )
    return worst_ratio(goal, ATTENTION_GOAL, found, wrong.get("attention_int8"))


def sage(rows: Sequence[Record], wrong: dict[str, str]) -> Verdict:
    goal = "attention over 32,760 keys is faster than SageAttention"
    found = pairs(
        rows,
        " 32760 keys",
        "attention",
        OUR_ATTENTION,
        lambda name: name.startswith("sageattention"),
    )
    return worst_ratio(goal, 1.0, found, wrong.get("attention_int8"))


def pairs(
    rows: Sequence[Record], shape: str, op: str, ours: str, is_peer: Callable[[str], bool]
) -> list[tuple[float, str]]:
    """(the fastest peer's time over ours, both rows in words) of each op and shape that both were
    measured at.
    """
    found = []
    timed = [
        row
        for row in rows
        if "median_ms" in row
        and "op" in row
        and row["op"].startswith(op)
        and shape in f"{row['shape']} "
    ]
    for own in [row for row in timed if row["provider"] == ours]:
        peers = [
            row
            for row in timed
            if (row["op"], row["shape"]) == (own["op"], own["shape"]) and is_peer(row["provider"])
        ]
        if peers:
            best = min(peers, key=lambda row: row["median_ms"])
            own_words = (
                f"{own['op']} {own['shape']}: {ours} {own['median_ms']:.3f} ms "
                f"({own['rate']:.0f} {own['unit']})"
            )
            found.append(
                (
                    best["median_ms"] / own["median_ms"],
                    f"{own_words}, {best['provider']} {best['median_ms']:.3f} ms",
                )
            )
    return found


def worst_ratio(
    goal: str, least: float, found: Sequence[tuple[float, str]], wrong: str | None
) -> Verdict:
    if not found:
        return Verdict(goal, UNKNOWN, "no pair of rows")
    ratio, words = min(found)
    worst = f", the worst of {len(found)}" if len(found) > 1 else ""
    if wrong:
        return Verdict(goal, MISSED, f"the kernel is wrong ({wrong}); {ratio:.2f}x: {words}")
    return Verdict(goal, MET if ratio >= least else MISSED, f"{ratio:.2f}x{worst}: {words}")


def elementwise(rows: Sequence[Record], wrong: dict[str, str]) -> Verdict:
    goal = f"element-wise kernels reach {ROWS_GOAL:.0%} of a copy's bandwidth"
    found = [
        row for row in rows if row.get("unit") == "GB/s" and "share" in row and row["share"] > 0
    ]
    if not found:
        return Verdict(goal, UNKNOWN, "no row beside a measured copy")
    worst = min(found, key=lambda row: row["share"])
    which = f"{worst['op']} {worst['shape']}, {worst['provider']} {worst['median_ms']:.3f} ms"
    words = f"{worst['share']:.0%}, the worst of {len(found)}: {which}"
    broken = [op for op in wrong if op not in ("quantized_linear", "attention_int8")]
    met = worst["share"] >= ROWS_GOAL and not broken
    return Verdict(
        goal, MET if met else MISSED, f"{words}{'; wrong: ' if broken else ''}{', '.join(broken)}"
    )


def block(rows: Sequence[Record]) -> Verdict:
    goal = f"a block in int8 takes 1/{BLOCK_GOAL} of diffusers' in bf16"
    times = {
        row["provider"]: row["median_ms"]
        for row in rows
        if row["step"] == "block" and row.get("median_ms")
    }
    if not {OURS, "diffusers bf16"} <= set(times):
        return Verdict(goal, UNKNOWN, "no pair of rows")
    ratio = times["diffusers bf16"] / times[OURS]
    number = f"{ratio:.2f}x: {', '.join(f'{name} {time:.1f} ms' for name, time in times.items())}"
    return Verdict(goal, MET if ratio >= BLOCK_GOAL else MISSED, number)


def same_latents(rows: Sequence[Record]) -> Verdict:
    return same(
        "budgets change no bit of the latents",
        [row for row in rows if row["step"] == "stream"],
        "latents_sha256",
    )


def same_frames(rows: Sequence[Record]) -> Verdict:
    clips = [row for row in rows if row["step"] == "demo" and "frames_sha256" in row]
    verdict = same(
        "budgets change no bit of the demo's frames, which show their prompt",
        clips,
        "frames_sha256",
    )
    if verdict.result == MET and not all(row["shows_its_prompt"] for row in clips):
        return Verdict(verdict.goal, MISSED, f"{verdict.number}, but they do not show the prompt")
    return verdict


def same(goal: str, rows: Sequence[Record], name: str) -> Verdict:
    """Whether rows within several budgets have one digest."""
    digests = [row[name] for row in rows if row.get(name)]
    if len(digests) < 2:
        return Verdict(goal, UNKNOWN, f"{len(digests)} rows to compare")
    if len(set(digests)) > 1:
        listed = ", ".join(digest[:12] for digest in digests)
        return Verdict(
            goal, MISSED, f"{len(set(digests))} results within {len(digests)} budgets: {listed}"
        )
    return Verdict(goal, MET, f"sha256 {digests[0][:12]} within {len(digests)} budgets")


def streaming(rows: Sequence[Record]) -> list[Verdict]:
    """The goals of the streaming benchmark that its short form can decide, and that no peak lay
    above its plan.
    """
    measured = [row for row in rows if row["step"] == "stream" and "layers" in row]
    if not measured:
        return [Verdict("streamed steps: overhead, peaks, prediction, switch", UNKNOWN, "no row")]
    try:
        from scripts.bench.stream_goals import verdicts as stream_verdicts
        from scripts.bench.stream_rows import StreamRow, exceeded
    except ImportError as error:
        return [
            Verdict(
                "streamed steps: overhead, peaks, prediction, switch", UNKNOWN, problem_of(error)
            )
        ]
    names = StreamRow.__dataclass_fields__
    typed = [
        StreamRow(**{name: value for name, value in row.items() if name in names})
        for row in measured
    ]
    over = exceeded(typed)
    peaks = [
        f"{row.peak_vram_gb:.2f} of {row.planned_vram_gb:.2f} GB"
        for row in typed
        if row.peak_vram_gb and row.planned_vram_gb
    ]
    result = MISSED if over else MET if peaks else UNKNOWN
    number = "; ".join(over) or ", ".join(peaks) or "no peak was measured"
    found = [Verdict("no peak of VRAM or RAM lies above its plan", result, number)]
    # not of absent clips
    judged = [
        one
        for one in stream_verdicts(typed)
        if one.goal.name in STREAM_GOALS and one.clip.endswith("steps")
    ]
    return found + [Verdict(one.goal.text, one.result, one.number) for one in judged]


def tiles(rows: Sequence[Record]) -> Verdict:
    goal = f"no other tile is more than {TILE_GAIN:.0%} faster than the present one"
    found = [row for row in rows if row["step"] == "tiles" and row.get("gain") is not None]
    if not found:
        return Verdict(goal, UNKNOWN, "no tile was measured")
    best = max(found, key=lambda row: row["gain"])
    result = MISSED if best["gain"] > TILE_GAIN else MET
    which = f"{best['name']} {tuple(best['tile'])} {best['median_ms']:.3f} ms"
    return Verdict(goal, result, f"{best['gain']:+.1%}: {which}, of {len(found)} tiles")
