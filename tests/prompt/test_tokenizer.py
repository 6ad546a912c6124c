"""Cleaning and tokenizing against the examples of spec section 3.2 and the `tokenizers` library's
own truncation.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from lowvram.errors import CheckpointError
from lowvram.prompt.tokenizer import Tokenizer, clean_prompt, tokenize
from lowvram.request import DEFAULT_NEGATIVE_PROMPT

PIECES = ["<pad>", "</s>", "<s>", "<unk>", "▁", "▁a", "▁red", "▁ball", "▁rolls", "b", "l", "a", "."]


def small_tokenizer() -> tokenizers.Tokenizer:
    scores = [(piece, 0.0 if at < 4 else -float(at)) for at, piece in enumerate(PIECES)]
    built = tokenizers.Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
    built.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    built.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    built.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>"])
    return built


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(small_tokenizer().to_str().encode())


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("“Hello”　ｗｏｒｌｄ！ &amp;amp; ﬁne", '"Hello" world! & fine'),
        ("  a\t red\r\n\nball  ", "a red ball"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("<i> &amp;lt;b&amp;gt;", "<i> <b>"),
        ("&nbsp;end&nbsp;", "end"),
        ("schÃ¶n", "schön"),
        ("A Cat, UPPER!", "A Cat, UPPER!"),
        ("lone \udc80 surrogate", "lone \ufffd surrogate"),
        ("", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_cleaning_the_negative_prompt_changes_only_the_commas() -> None:
    assert len(DEFAULT_NEGATIVE_PROMPT) == 137
    assert clean_prompt(DEFAULT_NEGATIVE_PROMPT) == DEFAULT_NEGATIVE_PROMPT.replace("，", ",")


def test_white_space_is_what_the_official_pattern_calls_so() -> None:
    spaces = [chr(code) for code in range(0x10000) if re.match(r"\s", chr(code))]
    assert all(not space.strip() for space in spaces)
    assert not [
        chr(code) for code in range(0xD800) if not chr(code).strip() and chr(code) not in spaces
    ]


def test_ids_end_with_the_end_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a red ball", 512) == [5, 6, 7, 1]
    assert tokenizer.encode("", 512) == [1]
    assert tokenizer.encode("  \n ", 512) == [1]


def test_unknown_characters_become_the_unknown_token(tokenizer: Tokenizer) -> None:
    assert 3 in tokenizer.encode("a Ж", 512)


@pytest.mark.parametrize("text_len", [1, 2, 3, 4, 5, 32])
def test_truncation_equals_that_of_the_library(tokenizer: Tokenizer, text_len: int) -> None:
    reference = small_tokenizer()
    reference.enable_truncation(text_len)
    for prompt in ("", "a", "a red ball", "a red ball rolls.", "ball " * 40):
        ids = tokenizer.encode(prompt, text_len)
        assert ids == reference.encode(prompt.strip()).ids
        assert len(ids) <= text_len
        assert ids[-1] == 1


def test_length_counts_what_truncation_drops(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("ball " * 40)) == 41
    assert len(tokenizer.encode("")) == 1


def test_padding_and_truncation_of_the_file_are_ignored() -> None:
    built = small_tokenizer()
    built.enable_padding(length=16)
    built.enable_truncation(2)
    assert Tokenizer(built.to_str().encode()).encode("a red ball", 512) == [5, 6, 7, 1]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Unigram"}}', b"not json\nat all"]
)
def test_an_unreadable_file_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer(content)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    other = tokenizers.Tokenizer(models.WordLevel({"[CLS]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match="</s>"):
        Tokenizer(other.to_str().encode())


def hostile(**changes: Any) -> bytes:
    """The small tokenizer with parts that its library accepts and does not survive."""
    return json.dumps(json.loads(small_tokenizer().to_str()) | changes).encode()


def replacements(count: int) -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaa"}
    return {"type": "Sequence", "normalizers": [rule] * count}


def test_a_process_gives_the_same_tokens() -> None:
    content = small_tokenizer().to_str().encode()
    for prompt in ("a red ball", "", "lone \udc80 surrogate", "“Hello”　ｗ"):
        expected = Tokenizer(content).encode(prompt)
        assert tokenize(content, prompt, 10**6) == expected
        assert tokenize(content, prompt, 10**6) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (hostile(normalizer=replacements(12)), "crash|failed|cannot be used|memory"),
        (
            hostile(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "^(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ),
            None,
        ),
        (
            hostile(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
            "tokenizer",
        ),
        (b"{" * 10**6, "tokenizer"),
        (b'{"model":' + b"[" * 10**6, "tokenizer"),
    ],
    ids=["expands", "slow pattern", "character map", "open", "deep"],
)
def test_p31_what_the_library_does_not_survive_is_an_error(
    content: bytes, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, panics, aborts and endless loops of the library end its process, not the run."""
    monkeypatch.setattr("lowvram.prompt.tokenizer.TIMEOUT_S", 5.0)
    began = time.monotonic()
    found = attempt(content, "a" * 40 + "!")
    assert "\n" not in found
    assert re.search(said or "ids|tokenizer", found)
    assert time.monotonic() - began < 10


def attempt(content: bytes, prompt: str) -> str:
    """The ids, or the message of the error that is in their place."""
    try:
        return f"ids {tokenize(content, prompt, 10**6)}"
    except CheckpointError as error:
        return str(error)
