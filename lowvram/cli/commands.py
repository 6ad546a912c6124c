"""The group of subcommands: errors as one line, or as JSON, and exit codes."""

from __future__ import annotations

import json
from typing import Any

import typer
from typer.core import TyperGroup

from lowvram.cli.terminal import emit, make_console, printable
from lowvram.errors import LowvramError

# What the parser raises for a wrong command line.
_ParserError: Any = typer.BadParameter.__bases__[0]
# Errors of the system that reach this place, and what to do about them.
_EXHAUSTED = {
    MemoryError: "the system gives this process no more memory: close other programs, or raise its "
    "limit (ulimit -v, the container's memory)",
    RuntimeError: "the system gives this process no more threads: raise its limit (ulimit -u, the "
    "container's pids)",
}


class Commands(TyperGroup):
    """The group of subcommands.

    Exit codes: 0 success, 1 failure (one line; `--debug` shows the traceback), 2 wrong usage,
    130 interrupted.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; print a `LowvramError` as one line and exit with its code.

        With --json it, or what the parser refuses, is also an object on standard output.
        """
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except LowvramError as error:
            if ctx.params.get("debug"):
                raise
            _tell(as_json, type(error).__name__, str(error))
            raise typer.Exit(error.exit_code) from error
        except _ParserError as error:
            if as_json:
                _emit_json("UsageError", error.format_message())
            raise
        except (MemoryError, RuntimeError) as error:
            told = next(text for kind, text in _EXHAUSTED.items() if isinstance(error, kind))
            if ctx.params.get("debug") or not _is_exhaustion(error):
                raise
            _tell(as_json, "OutOfMemoryError", told)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            make_console(stderr=True).print("interrupted")
            raise typer.Exit(130) from error


def _is_exhaustion(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)


def _tell(as_json: bool, kind: str, message: str) -> None:
    if as_json:
        _emit_json(kind, message)
    make_console(stderr=True).print(f"error: {printable(message)}", style="red", soft_wrap=True)


def _emit_json(kind: str, message: str) -> None:
    emit(json.dumps({"error": {"type": kind, "message": message}}))
