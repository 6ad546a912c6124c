"""The journal of a quantizer run: its identity and the error of every lossy tensor.

A file of JSON lines, each with a checksum; the identity is the first and is synced before anything
else is written. Errors are not synced: those that a crash removes are measured again from the
source. The writer keeps its own journals of the tensors written.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from lowvram.errors import ResumeError
from lowvram.files.limits import JSON_BYTES, read_at_most
from lowvram.files.write import BINARY, output_error, write_all
from lowvram_quantize.recipe import check_same
from lowvram_quantize.report import TensorError


class RunJournal:
    """The errors of a run by (component, tensor), kept in a file.

    The file exists only after the source has been checked for NaN and infinity.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        """Create the journal at `path`, or continue an existing one.

        Raises `ResumeError` if it has another identity, `OutputError` if it cannot be written.
        """
        self.path = path
        self.errors: dict[tuple[str, str], TensorError] = {}
        kept = _whole_lines(path)
        if kept:
            check_same(json.loads(kept[0])["entry"], identity, str(path.parent))
        for line in kept[1:]:
            error = TensorError(**json.loads(line)["entry"])
            self.errors[error.component, error.name] = error
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | BINARY, 0o666)
            os.ftruncate(self._fd, os.lseek(self._fd, sum(len(line) for line in kept), os.SEEK_SET))
            if not kept:
                self._append(identity)
                os.fsync(self._fd)
        except OSError as error:
            raise output_error(path, error) from error

    def __enter__(self) -> RunJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def add(self, error: TensorError) -> None:
        """Record the error of a tensor; raise `OutputError` if it cannot be written."""
        self.errors[error.component, error.name] = error
        try:
            self._append(asdict(error))
        except OSError as failure:
            raise output_error(self.path, failure, "make room and go on with --resume") from failure

    def _append(self, entry: object) -> None:
        line = json.dumps({"entry": entry, "sha256": _checksum(entry)})
        write_all(self._fd, line.encode() + b"\n")


def _checksum(entry: object) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines before the first that is not as it was written."""
    lines: list[bytes] = []
    try:
        content = read_at_most(path, JSON_BYTES)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path} cannot be read ({error}): start again without --resume"
        ) from error
    for line in content.splitlines(keepends=True):
        try:
            data = json.loads(line) if line.endswith(b"\n") else {}
            whole = data["sha256"] == _checksum(data["entry"])
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if not whole:
            break
        lines.append(line)
    return lines
