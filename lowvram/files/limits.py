"""Limits on what a file may expand to, checked before it is parsed."""

from __future__ import annotations

from pathlib import Path

# Of whole files and headers. UMT5's tokenizer.json has 17 MB, the header of a 14 B model 0.3 MB.
HEADER_BYTES = 16 * 2**20
JSON_BYTES = 16 * 2**20
TOKENIZER_FILE_BYTES = 32 * 2**20
CONFIG_BYTES = 2**20
# A value of JSON takes some 100 bytes of memory and 1 µs. A checkpoint has 1,100 tensors.
JSON_VALUES = 500_000


def count_values(text: bytes) -> int:
    """An upper bound on the number of values in a JSON text, without parsing it."""
    import numpy as np  # where the text is long alone

    # no quotes within texts are left, so that each text ends at the next one
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(plain, dtype=np.uint8)
    quotes = (characters == ord('"')).view(np.uint8)
    outside = np.bitwise_xor.accumulate(quotes) == 0
    marks = np.zeros(256, dtype=bool)
    marks[list(b",[{:")] = True
    return int(np.count_nonzero(marks[characters] & outside))


def check_values(text: bytes) -> None:
    """Raise `ValueError` if a JSON text has more than `JSON_VALUES` values."""
    if len(text) > JSON_VALUES and (count := count_values(text)) > JSON_VALUES:
        raise ValueError(f"it has {count} values, above the limit of {JSON_VALUES}")


def read_at_most(path: Path, cap_bytes: int) -> bytes:
    """The content of a regular file. Raises `OSError`, and `ValueError` if it is larger."""
    if not path.is_file() and path.exists():
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        content = file.read(cap_bytes + 1)
    if len(content) > cap_bytes:
        raise ValueError(f"it is larger than {cap_bytes} bytes")
    return content
