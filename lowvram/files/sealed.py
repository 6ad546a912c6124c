"""Small files of JSON that lowvram reads back: with a checksum over all of their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lowvram.files.limits import CONFIG_BYTES, check_values, read_at_most
from lowvram.files.write import replace_file

_CHECKSUM = "sha256"


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` atomically by `content` and its checksum. Raises `OutputError`."""
    sealed = content | {_CHECKSUM: _checksum(content)}
    replace_file(path, (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises `OSError`, and `ValueError` if it is not as it was."""
    text = read_at_most(path, CONFIG_BYTES)
    check_values(text)
    try:
        content = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict) or content.pop(_CHECKSUM, None) != _checksum(content):
        raise ValueError("it is not as it was written")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
