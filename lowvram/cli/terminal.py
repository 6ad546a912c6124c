"""Print to the terminal: text from outside as it is, on every kind of output."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from rich.console import Console, RenderableType

from lowvram.errors import OutputError


def printable(text: str) -> str:
    """Replace what is not printable (escape codes, newlines, direction marks) by its escape, such
    as `\\x1b`.
    """
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def make_console(stderr: bool = False) -> Console:
    """A console without markup: brackets in names and prompts are brackets."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class PrintableFormatter(logging.Formatter):
    """Log records of one printable line each; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return printable(super().formatMessage(record))


def accept_every_character() -> None:
    """Make stdout and stderr write a character that their encoding lacks as its escape."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def emit(*parts: RenderableType, finished_work: bool = False) -> None:
    """Print text and tables to stdout. Text is written as it is, for scripts.

    A pipe that was closed is ignored. Raises `OutputError` if stdout cannot be written otherwise;
    after `finished_work` that is a warning, because the work's result is elsewhere.
    """
    with _writing(finished_work):
        for part in parts:
            if isinstance(part, str):
                sys.stdout.write(f"{part}\n")
            else:
                console = make_console()
                with console.capture() as captured:  # rich would exit with 1 on a closed pipe
                    console.print(part)
                sys.stdout.write(captured.get())
        sys.stdout.flush()


@contextmanager
def reported_output_errors() -> Iterator[None]:
    """Exit with one line and 1 where the standard output cannot be written, such as for the help
    and the version, which the parser prints.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputError as error:
        _exit_with(str(error))
    except OSError as error:
        if error.filename is not None:
            raise
        closed = error.errno in (errno.EPIPE, errno.EINVAL)
        _exit_with("" if closed else _unwritable(error))


def _exit_with(message: str) -> NoReturn:
    _discard_stdout()
    if message:
        make_console(stderr=True).print(f"error: {printable(message)}", style="red", soft_wrap=True)
    sys.exit(1)


def _unwritable(error: OSError) -> str:
    return f"cannot write to the standard output: {error.strerror or error}"


@contextmanager
def _writing(finished_work: bool) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _discard_stdout()
        if error.errno in (errno.EPIPE, errno.EINVAL):  # EINVAL: a closed pipe on Windows
            return
        message = _unwritable(error)
        if not finished_work:
            raise OutputError(f"{message}: send it to another place") from error
        make_console(stderr=True).print(
            f"{message}; the work itself is done", style="yellow", soft_wrap=True
        )


def _discard_stdout() -> None:
    """Send what is still buffered for stdout nowhere, so that Python's exit does not fail on it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
