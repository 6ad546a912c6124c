"""The results of `bench all`: a file of JSON lines, each appended and synced as it is measured,
so that no crash loses one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.bench import ROOT

ROWS = "rows.jsonl"
# What decides a number: the code that is measured and the code that measures. Documents and tests
# do not.
SOURCES = ("lowvram", "kernels", "quantize", "scripts")
Record = dict[str, Any]


class ResultsNotWritten(Exception):
    """The file of results takes no more: nothing that follows in this process could be kept."""


class Results:
    """The records of one folder, and of earlier folders that count as if they were in it.

    A record has `step`, `unit` and `event`: `begin` and `end` of a unit, or `row`, a measured one.
    `end` has `status` (done, failed, left out) and `reason`. `call` tells one run of the command
    from another; `identity` is the machine, the versions and the code.
    """

    def __init__(self, folder: Path, call: str, earlier: Sequence[Path] = ()) -> None:
        self.path, self.call = folder / ROWS, call
        self._earlier = [path / ROWS for path in earlier]

    def append(self, record: Record) -> None:
        """Writes one line and waits until it is on the disk. Raises `ResultsNotWritten`."""
        line = json.dumps({**record, "call": self.call}, ensure_ascii=False)
        try:
            with self.path.open("ab") as file:
                # a process was killed in the middle of a line
                torn = file.tell() and self._last_byte() != b"\n"
                file.write((b"\n" if torn else b"") + line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResultsNotWritten(
                f"{self.path} cannot be written: {problem_of(error)}"
            ) from error

    def _last_byte(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1)

    def records(self) -> list[Record]:
        """All of them, earlier folders first; lines that are not whole are left out."""
        return [record for path in (*self._earlier, self.path) for record in read_records(path)]

    def rows(self, step: str, identity: str) -> list[Record]:
        """The measured rows of a step on this machine with this code; of rows with one key the
        last.
        """
        ours = [
            record
            for record in self.records()
            if (record["step"], record["identity"]) == (step, identity)
        ]
        found = [record for record in ours if record["event"] == "row"]
        return list({row_key(record): record for record in found}.values())

    def done(self, step: str, identity: str) -> set[str]:
        """Units that need not be run again: those that ended well on this machine with this
        code.
        """
        return {
            record["unit"]
            for record in self._ends(step)
            if record["status"] == "done" and record["identity"] == identity
        }

    def failed(self, step: str) -> dict[str, str]:
        """Units that ended badly in this call, and why: they are not tried again in it."""
        ours = [record for record in self._ends(step) if record["call"] == self.call]
        return {record["unit"]: record["reason"] for record in ours if record["status"] == "failed"}

    def ended(self, step: str, unit: str, identity: str) -> Record | None:
        """How a unit ended last: in this call, or well in an earlier one."""
        ends = [
            record
            for record in self._ends(step)
            if record["unit"] == unit and record["identity"] == identity
        ]
        counting = [
            record for record in ends if record["call"] == self.call or record["status"] == "done"
        ]
        return counting[-1] if counting else None

    def state(self, step: str, unit: str) -> str:
        """`begun` where it was begun in this call and has not ended, else the status of its end, or
        nothing.
        """
        ours = [
            record
            for record in read_records(self.path)
            if (record["step"], record["unit"], record["call"]) == (step, unit, self.call)
        ]
        events = [record.get("status", "begun") for record in ours if record["event"] != "row"]
        return events[-1] if events else ""

    def unfinished(self, step: str) -> Record | None:
        """The record of the unit that was begun in this call and never ended: what a process died
        of. None where there is none.
        """
        ours = [
            record
            for record in read_records(self.path)
            if record["step"] == step and record["call"] == self.call
        ]
        ended = {record["unit"] for record in ours if record["event"] == "end"}
        begun = [
            record for record in ours if record["event"] == "begin" and record["unit"] not in ended
        ]
        return begun[-1] if begun else None

    def _ends(self, step: str) -> Iterator[Record]:
        return (
            record
            for record in self.records()
            if record["event"] == "end" and record["step"] == step
        )


def row_key(row: Record) -> tuple[str, ...]:
    """What a later measurement of the same thing replaces."""
    names = (
        "step",
        "unit",
        "op",
        "shape",
        "provider",
        "name",
        "tile",
        "size",
        "vram_budget_gb",
        "ram_budget_gb",
    )
    return tuple(str(row.get(name, "")) for name in names)


def read_records(path: Path) -> Iterator[Record]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"step", "unit", "event", "call", "identity"} <= set(
                record
            ):
                yield record


def problem_of(error: BaseException) -> str:
    """One line: a full disk by name, else the error's own first line, or its type where it says
    nothing.
    """
    if isinstance(error, ResultsNotWritten):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def source_digest(root: Path = ROOT) -> str:
    """16 hex digits of all Python sources that a number depends on: the commit's stand-in where
    there is no git.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        digest.update(
            path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:16]


def commit_of(root: Path = ROOT) -> str:
    """The short commit, with a `+` where files differ from it; "unknown" without git."""
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return (
            f"{head}+"
            if head and _git(root, "status", "--porcelain", "--", *SOURCES)
            else head or "unknown"
        )
    except OSError:
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    ).stdout.strip()


def latest(records: Iterable[Record], **wanted: object) -> Record | None:
    """The last record whose fields are `wanted`."""
    found = [
        record
        for record in records
        if all(record.get(name) == value for name, value in wanted.items())
    ]
    return found[-1] if found else None
