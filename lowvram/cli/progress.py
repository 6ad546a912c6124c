"""Progress bars of `generate`, `quantize` and `inspect --verify`, and the time of each phase."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from lowvram.planner.phases import PHASES
from lowvram.progress import Listener, Progress
from lowvram.units import format_bytes

if TYPE_CHECKING:
    from lowvram_quantize.progress import QuantizeProgress

LINE_PERIOD_S = 15.0


def duration(seconds: float) -> str:
    """Format seconds: `45 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Events:
    """Progress as one JSON object a line on standard error, for scripts: every event."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._began: dict[str, float] = {}

    def say(self, phase: str, done: int, total: int, left_s: float | None, **more: str) -> None:
        """Print the state of a phase."""
        now = time.monotonic()
        began = self._began.setdefault(phase, now)
        event = {"phase": phase, "done": done, "total": total, "unit": self._unit}
        times = {"elapsed_s": round(now - began, 3), "left_s": left_s}
        print(json.dumps(event | times | more), file=sys.stderr, flush=True)


class Lines:
    """Progress as lines of text, for a console that is not a terminal: one line when a task starts
    and one every `LINE_PERIOD_S` seconds.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed_at: dict[str, float] = {}

    def say(self, label: str, state: str) -> None:
        """Print the state of task `label`, unless its last line is younger than the period."""
        now = time.monotonic()
        if label not in self._printed_at:
            self._console.print(label, soft_wrap=True)
        elif now - self._printed_at[label] >= LINE_PERIOD_S:
            self._console.print(f"{label}: {state}", soft_wrap=True, highlight=False)
        else:
            return
        self._printed_at[label] = now


@contextmanager
def generation_progress(console: Console, style: str = "bar") -> Iterator[Listener]:
    """A listener that shows one bar per phase, with the pipeline's estimate of the time left.

    style: `bar`, or `json` for a line per event.
    """
    if style == "json":
        events = Events("steps")
        yield lambda event: events.say(event.phase, event.done, event.total, event.seconds_left)
        return
    if not console.is_terminal:
        lines = Lines(console)

        def print_line(event: Progress) -> None:
            left = _time_left(event)
            state = f"{event.done} of {event.total}"
            lines.say(PHASES[event.phase].label, f"{state}, {left}" if left else state)

        yield print_line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    bars: dict[str, TaskID] = {}
    with RichProgress(*columns, console=console) as display:

        def update_bar(event: Progress) -> None:
            if event.phase not in bars:
                bars[event.phase] = display.add_task(
                    PHASES[event.phase].label, total=event.total, left=""
                )
            display.update(bars[event.phase], completed=event.done, left=_time_left(event))

        yield update_bar


def _time_left(event: Progress) -> str:
    if event.seconds_left is None or event.done == event.total:
        return ""
    return f"{duration(event.seconds_left)} left"


@contextmanager
def quantize_progress(
    console: Console, style: str = "bar"
) -> Iterator[Callable[[QuantizeProgress], None]]:
    """A listener that shows one bar for the NaN scan of the source and one for quantization, each
    with bytes, speed and time left. style: as in `generation_progress`.
    """
    if style == "json":
        events = Events("bytes")
        yield lambda event: events.say(
            event.phase,
            event.done_bytes,
            event.total_bytes,
            event.left_s,
            component=event.component,
            tensor=event.tensor,
        )
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[tensor]}", style="dim", markup=False),
    )
    labels = {"scan": "checking the source", "quantize": "quantizing"}
    bars: dict[str, TaskID] = {}
    if not console.is_terminal:
        lines = Lines(console)

        def print_line(event: QuantizeProgress) -> None:
            amount = (
                f"{format_bytes(event.done_bytes)} of {format_bytes(event.total_bytes)}, "
                f"{format_bytes(event.bytes_per_s)}/s"
            )
            lines.say(labels[event.phase], f"{amount}, {duration(event.left_s)} left")

        yield print_line
        return
    with RichProgress(*columns, console=console) as display:

        def update_bar(event: QuantizeProgress) -> None:
            if event.phase not in bars:
                bars[event.phase] = display.add_task(
                    labels[event.phase], total=event.total_bytes, speed="", left="", tensor=""
                )
            finished = event.done_bytes >= event.total_bytes
            display.update(
                bars[event.phase],
                completed=event.done_bytes,
                speed=f"{format_bytes(event.bytes_per_s)}/s",
                left="" if finished else f"{duration(event.left_s)} left",
                tensor="" if finished else f"{event.component} {event.tensor}",
            )

        yield update_bar


@contextmanager
def verify_progress(console: Console, style: str = "bar") -> Iterator[Callable[[int, int], None]]:
    """A listener `(done_bytes, total_bytes)` that shows one bar over the bytes hashed.

    style: as in `generation_progress`.
    """
    if style == "json":
        events = Events("bytes")
        yield lambda done, total: events.say("verify", done, total, None)
        return
    if not console.is_terminal:
        lines = Lines(console)
        yield lambda done, total: lines.say(
            "verifying", f"{format_bytes(done)} of {format_bytes(total)}"
        )
        return
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as display:
        bar = display.add_task("verifying", total=None)
        yield lambda done, total: display.update(bar, completed=done, total=total)


class PhaseTimer:
    """A listener that forwards every event and records, for each phase, the times of its first and
    last events and the units finished in between.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        # phase -> (seconds at first event, at last event, units done at first, at last)
        self._spans: dict[str, tuple[float, float, int, int]] = {}

    def __call__(self, event: Progress) -> None:
        """Record `event` and forward it."""
        now = time.monotonic()
        began, _, first, _ = self._spans.get(event.phase, (now, now, event.done, event.done))
        self._spans[event.phase] = (began, now, first, event.done)
        self._listener(event)

    @property
    def phase_s(self) -> dict[str, float]:
        """Seconds from the first to the last event of each phase."""
        return {phase: last - began for phase, (began, last, _, _) in self._spans.items()}

    @property
    def step_s(self) -> float | None:
        """Mean seconds of a denoising step in this process; None before one has finished."""
        began, last, first, done = self._spans.get("denoise", (0.0, 0.0, 0, 0))
        return (last - began) / (done - first) if done > first else None
