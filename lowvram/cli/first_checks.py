"""What the commands check in the first second, before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowvram.errors import CheckpointError, LoraError, LowvramError, OutputError, UsageError
from lowvram.files.lock import OutputLock
from lowvram.files.output import check_output, fresh_outputs
from lowvram.request import MAX_PROMPT_CHARACTERS

MAX_PROMPT_BYTES = 4 * MAX_PROMPT_CHARACTERS  # in UTF-8


def check_source(path: Path, model: Path) -> None:
    """Raise `LowvramError` if the folder of a checkpoint, or of the result, cannot be read."""
    check_readable(path)
    check_readable(model)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give the folder of the whole model")


def check_lora(text: str) -> None:
    """Raise `LowvramError` if no file of a LoRA, `FILE` or `FILE:STRENGTH`, is there."""
    if not any(Path(name).exists() for name in (text, text.rpartition(":")[0]) if name):
        raise LoraError(f"{text} does not exist: check the name of the LoRA")


def check_model(path: Path) -> None:
    """Raise `LowvramError` if there is no quantized model that can be read."""
    check_readable(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: make it with `lowvram quantize SOURCE {path}`"
        )


def check_readable(path: Path) -> None:
    """Raise `LowvramError` if the user has no permission to read `path`.

    A path that does not exist passes; the command itself reports it.
    """
    try:
        needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
        allowed = not path.exists() or os.access(path, needed)
    except OSError as error:  # for example a parent folder without permission, or a long name
        raise LowvramError(
            f"cannot read {path}: {error.strerror}: check its name, its owner and its permissions"
        ) from error
    if not allowed:
        raise LowvramError(
            f"cannot read {path}: Permission denied: check its owner and its permissions"
        )


def chosen_size(
    size: str | None, width: int | None, height: int | None
) -> str | tuple[int, int] | None:
    """The size of --size, or of --width and --height. Raises `UsageError` for half of a size."""
    if width is None and height is None:
        return size
    if size is not None:
        raise UsageError("give either --size or --width and --height")
    if width is None or height is None:
        raise UsageError("give both --width and --height, or --size WIDTHxHEIGHT")
    return width, height


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of --prompt or --prompt-file.

    Raises `UsageError` unless exactly one is given, and `LowvramError` if the file cannot be read
    as UTF-8.
    """
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give either --prompt TEXT or --prompt-file FILE")
    if prompt_file is None:
        return prompt or ""
    try:
        if str(prompt_file) == "-":
            content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with prompt_file.open("rb") as file:
                content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise UsageError(
                f"the prompt file {prompt_file} is longer than {MAX_PROMPT_BYTES} bytes: give a "
                f"text file that contains the prompt alone"
            )
        # utf-8-sig: editors on Windows may write a byte order mark.
        return content.decode("utf-8-sig")
    except OSError as error:
        advice = "check the name, or use --prompt TEXT"
        raise LowvramError(
            f"cannot read the prompt file {prompt_file}: {error.strerror}: {advice}"
        ) from error
    except UnicodeDecodeError as error:
        raise LowvramError(
            f"the prompt file {prompt_file} is not UTF-8 text: save it as UTF-8"
        ) from error


@contextmanager
def locked_output(out: Path | None, overwrite: bool, resume: bool) -> Iterator[Path]:
    """The video to write, checked and locked: `out`, or the first fresh name that no other run
    holds.

    Raises `UsageError`, `OutputError`.
    """
    path, lock = _locked(out, overwrite, resume)
    with lock:
        check_output(path, overwrite)  # a run that held the lock may have finished
        yield path


def _locked(out: Path | None, overwrite: bool, resume: bool) -> tuple[Path, OutputLock]:
    refusal: OutputError | None = None
    for path in [out] if out is not None else fresh_outputs(Path(), resume):
        check_output(path, overwrite)
        try:
            return path, OutputLock(path, is_file=True)
        except OutputError as error:
            refusal = error
            if out is not None or resume:
                break
    raise refusal or OutputError("no free name for the video: give one with --out")
