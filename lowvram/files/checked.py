"""Convert parsed JSON to typed objects with msgspec, with errors that name key and value."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_AT = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_STEP = re.compile(r"\.(?P<key>\w+)|\[(?P<index>\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `(?P<key>[^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`")
SHOWN_CHARACTERS = 80


def checked(data: Any, kind: type[T], strict: bool = True) -> T:
    """`data` as `kind`, a dataclass or msgspec struct.

    strict: numbers in text are refused. Raises `ValueError` that names the key, its value and what
    is expected.
    """
    try:
        return msgspec.convert(data, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ValueError(_described(str(error), data)) from error


def _described(message: str, data: Any) -> str:
    found = _AT.search(message)
    path, reason = (found["path"], message[: found.start()]) if found else ("", message)
    missing, unknown = _MISSING.match(reason), _UNKNOWN.match(reason)
    where = path.lstrip(".")
    prefix = f"{where}: " if where else ""
    if missing:
        return f"{prefix}lacks the key {missing['key']!r}"
    if unknown:
        return f"{prefix}unknown key {unknown['key'][:SHOWN_CHARACTERS]!r}"
    if not where:
        return reason
    found_value = _value_at(data, path)
    value = repr(found_value)[:SHOWN_CHARACTERS]
    expected = reason.removeprefix("Expected ").split(", got ")[0].replace("`", "")
    if found_value is ...:
        return f"{where}: expected {expected}"
    if reason.startswith("Invalid enum value"):
        return f"{where} is {value}, which this version does not read"
    if not reason.startswith("Expected "):
        return f"{where}: {reason}"
    return f"{where} is {value}, expected {expected}"


def _value_at(data: Any, path: str) -> Any:
    """The value at a path such as `.dit.patch_size[0]`; `...` where the path has wildcards."""
    for step in _STEP.finditer(path):
        try:
            data = data[step["key"] or int(step["index"])]
        except (KeyError, IndexError, TypeError, ValueError):
            return ...
    return data
