"""Parse and format amounts of memory and video sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowvram.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# Less without a unit is a number whose unit was forgotten.
SMALLEST_BARE_BYTES = 2**20
# Names of sizes, at the models' own aspect ratio.
NAMED_SIZES = {"480p": (832, 480), "720p": (1280, 720)}


def parse_bytes(text: str) -> int:
    """Parse an amount of memory into bytes: `8GiB`, `8GB`, `8G`, `8192MiB` or a number of bytes.

    Raises `UsageError`, also for a small number without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"invalid amount of memory {text!r}: write it like 8GiB, 8GB or 8192MiB")
    amount = float(match[1]) * unit
    if not match[2] and 0 < amount < SMALLEST_BARE_BYTES:
        raise UsageError(
            f"{text!r} is a number of bytes: did you mean {match[1]}GiB, or {match[1]}GB?"
        )
    if amount >= 2**63:
        raise UsageError(f"amount of memory {text[:80]!r} is too large: write it like 8GiB")
    return int(amount)


def parse_size(text: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT`, `WIDTH*HEIGHT` or a name of `NAMED_SIZES` into (width, height).

    Raises `UsageError`.
    """
    named = NAMED_SIZES.get(text.strip().lower())
    if named:
        return named
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX*]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UsageError(f"invalid size {text!r}: write it like 832x480, or 480p or 720p")
    return int(match[1]), int(match[2])


def clip_size(size: str | Sequence[int]) -> tuple[int, int]:
    """Return (width, height) in pixels from `WIDTHxHEIGHT` or from a pair.

    The numbers of a pair are not checked here; `request.check_clip` does that. Raises
    `UsageError`.
    """
    if isinstance(size, str):
        return parse_size(size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise UsageError(f"size is {shown(size)}: expected (width, height) or text like 832x480")
    return size[0], size[1]


def format_bytes(count: float) -> str:
    """Format the size of a file, or a speed per second, in decimal units: `14.50 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_memory(count: float) -> str:
    """Format VRAM or RAM in binary units, as budgets are given: `8.00 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def shown(value: object) -> str:
    """Format a value for an error message: its repr, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:80]
