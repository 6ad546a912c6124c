"""Promise 31: a hostile file is refused before it expands, within 256 MB and a second."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.files.limits import JSON_VALUES, check_values, count_values

# Prints the error, the seconds of this process and the growth of its peak memory in bytes.
READ = """
import resource, sys, time
from pathlib import Path
from lowvram.checkpoint.layouts.parts import read_tokenizer
from lowvram.checkpoint.readers.files import read_json
from lowvram.checkpoint.readers.safetensors import TensorFile
from lowvram.cli.first_checks import read_prompt
from lowvram.errors import LowvramError
from lowvram.hardware.profile import ProfileKey, load_profile
kind, path = sys.argv[1], Path(sys.argv[2])
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    if kind == "safetensors":
        TensorFile(path)
    elif kind == "prompt":
        read_prompt(None, path)
    elif kind == "tokenizer":
        read_tokenizer(path.parent, path)
    else:
        read_json(path.parent, path)
    print("accepted")
except LowvramError as error:
    print(str(error)[-300:].replace(chr(10), " "))
print(time.process_time() - began)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def with_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def many_tensors() -> bytes:
    entries = {
        f"t{number}": {"dtype": "F32", "shape": [], "data_offsets": [4 * number, 4 * number + 4]}
        for number in range(150_000)
    }
    return with_header(json.dumps(entries).encode()) + bytes(600_000)


HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a long header": (
        "safetensors",
        lambda: with_header(b'{"a":"' + b"x" * 33_000_000 + b'"}'),
        "limit",
    ),
    "many tensors": ("safetensors", many_tensors, "above the limit"),
    "deep": ("safetensors", lambda: with_header(b'{"a":' + b"[" * 300_000), "JSON"),
    "many values": ("json", lambda: b'{"a":[' + b"0," * 8_000_000 + b"0]}", "above the limit"),
    "many texts": ("json", lambda: b'{"a":[' + b'"",' * 5_000_000 + b'""]}', "above the limit"),
    "a long file": ("json", lambda: b" " * 60_000_000, "larger than"),
    "a long tokenizer": (
        "tokenizer",
        lambda: b'{"a":[' + b"0," * 20_000_000 + b"0]}",
        "larger than",
    ),
    "a wide tokenizer": ("tokenizer", lambda: b'{"a":[' + b"0," * 15_000_000 + b"0", "JSON"),
    "a long prompt": ("prompt", lambda: b"a" * 60_000_000, "longer than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_p31_a_hostile_file_is_refused_before_it_expands(name: str, tmp_path: Path) -> None:
    kind, content, said = HOSTILE[name]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content())
    done = subprocess.run(
        [sys.executable, "-c", READ, kind, str(path)], capture_output=True, text=True, check=True
    )
    error, seconds, nbytes = done.stdout.splitlines()
    assert said in error
    assert float(seconds) < 1
    assert int(nbytes) < 256 * 10**6


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device of zeros")
def test_p31_an_endless_prompt_file_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, "prompt", "/dev/zero"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "longer than" in done.stdout


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b"{}", 1),
        (b'{"a": [1, 2]}', 4),
        (b'{"a": "[,,,{:"}', 2),
        (b'{"a\\"[": "\\\\"}', 2),
        (b'["unfinished, [[[', 1),
        (b'["\\\\\\", [["]', 1),
    ],
)
def test_values_are_counted_without_the_texts(text: bytes, values: int) -> None:
    assert count_values(text) == values


def test_long_texts_are_no_values() -> None:
    check_values(b'{"workflow": "' + b"[1,2]," * JSON_VALUES + b'"}')
    with pytest.raises(ValueError, match="above the limit"):
        check_values(b"[" + b"1," * JSON_VALUES + b"1]")
