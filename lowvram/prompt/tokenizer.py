"""Prompt cleaning and tokenization, as in the official code (spec section 3.2).

The `tokenizers` library panics, aborts or takes all memory for some files. `tokenize` runs it in a
process of its own, where each of these becomes an error.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

from lowvram.errors import CheckpointError

END = "</s>"
TIMEOUT_S = 60.0
# Of the process without a tokenizer: its libraries and what they hold while they work.
BASE_BYTES = 256 * 2**20
_ADVICE = "copy it again from the model"
_MAIN = "import sys; sys.path[:] = {}; from lowvram.prompt.tokenizer import main; main({})"


def clean_prompt(text: str) -> str:
    """Clean a prompt: ftfy, unescape HTML entities twice, collapse and strip white space.

    Case and punctuation are kept.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """UMT5 tokenizer from the bytes of the model's `tokenizer.json`, in this process.

    The constructor raises `CheckpointError` for invalid bytes or a tokenizer without `</s>`.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # the library raises bare `Exception`
            raise CheckpointError(
                f"cannot read tokenizer.json ({_one_line(error)}): {_ADVICE}"
            ) from error
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise CheckpointError(
                f"tokenizer.json has no token {END}, so it is not UMT5's: {_ADVICE}"
            )
        self.end_id = int(end)
        # Ignore the padding and truncation settings of the file.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, prompt: str, text_len: int | None = None) -> list[int]:
        """Token ids of the cleaned prompt and `</s>`, truncated to `text_len` in total."""
        ids = self._tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids
        return [*(ids if text_len is None else ids[: text_len - 1]), self.end_id]


def tokenize(tokenizer_json: bytes, prompt: str, memory_bytes: int) -> list[int]:
    """Token ids of the cleaned prompt and `</s>`, not truncated, from a process of its own.

    memory_bytes: what the tokenizer may take, where the system can limit it. The result is kept for
    later calls. Raises `CheckpointError` for a tokenizer that is invalid, crashes, takes more
    memory or no end.
    """
    digest = hashlib.sha256(tokenizer_json).digest()
    if (digest, prompt) not in _known():
        while len(_known()) >= 32:
            _known().pop(next(iter(_known())))
        _known()[digest, prompt] = _in_process(tokenizer_json, prompt, memory_bytes)
    return list(_known()[digest, prompt])


@cache
def _known() -> dict[tuple[bytes, str], list[int]]:
    return {}


def _in_process(tokenizer_json: bytes, prompt: str, memory_bytes: int) -> list[int]:
    text = json.dumps(prompt).encode()  # ASCII, also for lone surrogates
    command = [sys.executable, "-c", _MAIN.format(sys.path, memory_bytes)]
    single = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603  (a module of our own)
            command,
            input=len(text).to_bytes(8, "little") + text + tokenizer_json,
            capture_output=True,
            timeout=TIMEOUT_S,
            env=os.environ | single,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"tokenizer.json gave no tokens within {TIMEOUT_S:.0f} s: {_ADVICE}"
        ) from error
    try:
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise CheckpointError(str(answer["error"]))
        return [int(token) for token in answer["ids"]]
    except (ValueError, KeyError, TypeError) as error:
        said = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        raise CheckpointError(
            f"the tokenizers library failed on tokenizer.json (exit {done.returncode}: {said}): "
            f"{_ADVICE}"
        ) from error


def main(memory_bytes: int) -> None:
    """The process of `tokenize`: reads a prompt and a tokenizer, prints ids."""
    _ignore_ctrl_c()
    length = int.from_bytes(sys.stdin.buffer.read(8), "little")
    prompt, tokenizer_json = json.loads(sys.stdin.buffer.read(length)), sys.stdin.buffer.read()
    _limit_memory(memory_bytes + BASE_BYTES)
    try:
        answer: dict[str, object] = {"ids": Tokenizer(tokenizer_json).encode(prompt)}
    except CheckpointError as error:
        answer = {"error": str(error)}
    except BaseException as error:  # a panic of Rust is no `Exception`
        answer = {"error": f"tokenizer.json cannot be used ({_one_line(error)}): {_ADVICE}"}
    print(json.dumps(answer))


def _ignore_ctrl_c() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that waits for it hears it


def _limit_memory(nbytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    set_limit: Callable[[int, tuple[int, int]], None] = resource.setrlimit
    set_limit(resource.RLIMIT_DATA, (nbytes, nbytes))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
