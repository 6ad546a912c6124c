"""Plots of what the benchmarks measured, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from scripts.bench.timeline import Timeline, stall_seconds

ROW = 18  # pixels
LABELS, BARS = 290, 400  # width of the names and of the longest bar
TIMELINE_BLOCKS = 60


class Bar(NamedTuple):
    """One measured value: `share` of the longest bar, and what is written beside it."""

    group: str
    name: str
    share: float
    text: str


def bars(title: str, rows: Sequence[Bar]) -> str:
    """One bar per row under a heading per group; lowvram's own stand out."""
    lines, top, group = [f'<text x="10" y="20">{escape(title)}</text>'], 30, ""
    for row in rows:
        if row.group != group:
            group, top = row.group, top + 22
            lines.append(f'<text x="10" y="{top - 6}" font-weight="bold">{escape(group)}</text>')
        colour = "#2266cc" if row.name.startswith("lowvram") else "#999999"
        width = BARS * row.share
        lines.append(
            f'<text x="{LABELS}" y="{top + 13}" text-anchor="end">{escape(row.name)}</text>'
        )
        lines.append(
            f'<rect x="{LABELS + 10}" y="{top + 2}" width="{width:.1f}" height="{ROW - 4}" '
            f'fill="{colour}"/>'
        )
        lines.append(
            f'<text x="{LABELS + 18 + width:.1f}" y="{top + 13}">{escape(row.text)}</text>'
        )
        top += ROW
    return _svg(LABELS + BARS + 170, top + 20, lines)


def timeline_plot(timeline: Timeline, title: str) -> str:
    """The last visits of a run (below) and the copies beside them (above), on one axis of seconds;
    while computing waits there is a gap.
    """
    visits = timeline.visits[-TIMELINE_BLOCKS:]
    first, last = visits[0].asked_s, visits[-1].end_s
    copies = [
        (max(start, first), min(end, last))
        for start, end in timeline.copies
        if end > first and start < last
    ]
    scale = 960 / max(1e-9, last - first)
    waited = f"{last - first:.3f} s in all, {stall_seconds(visits):.3f} s of it stalls (gaps below)"
    lines = [
        f'<text x="10" y="20">{escape(title)}: copies above, blocks computing below; '
        f"{waited}</text>"
    ]
    for row, (label, parts) in enumerate(
        (("copy", copies), ("compute", [(visit.start_s, visit.end_s) for visit in visits]))
    ):
        lines.append(f'<text x="10" y="{52 + 30 * row}">{label}</text>')
        for number, (start, end) in enumerate(parts):
            colour = (("#2266cc", "#77aaee"), ("#cc6622", "#eeaa77"))[row][number % 2]
            x, width = 70 + (start - first) * scale, max(0.3, (end - start) * scale)
            lines.append(
                f'<rect x="{x:.2f}" y="{40 + 30 * row}" width="{width:.2f}" height="18" '
                f'fill="{colour}"/>'
            )
    return _svg(1050, 110, lines)


def write_svg(path: Path, svg: str) -> None:
    path.write_text(svg + "\n", encoding="utf-8")


def _svg(width: int, height: int, lines: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>"])
