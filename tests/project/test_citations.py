"""Citations of the documents lead somewhere: the file exists, and so does its section or promise.

CONTRIBUTING.md lists the forms in which comments, docstrings and documents cite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lowvram", "kernels", "quantize", "scripts", "tests", "examples", "docs")
DOCUMENTS = {
    "design": "docs/design.md",
    "spec": "docs/facts/wan22_spec.md",
    "kernels": "docs/facts/kernels.md",
    "formats": "docs/facts/formats.md",
}
PROMISES = "docs/promises.md"

_NUMBER = r"[0-9]+(?:\.[0-9]+|[a-z])?(?![\w%])"
_NUMBERS = rf"({_NUMBER}(?:(?:,? and |, ){_NUMBER})*)"
_SECTION = re.compile(
    rf"(?<![\w.*`-])(?:(design|spec|kernels|formats)(?:\.md)?(?:,? sections?)?"
    rf"|`?(docs/[\w/]+\.md)`?,? sections?) {_NUMBERS}"
)
_PROMISE = re.compile(rf"\b[Pp]romises? {_NUMBERS}")
_TEST_NAME = re.compile(r"\btest_p([0-9]+)_")
_DOCUMENT = re.compile(r"(?<![\w/.])(docs/[\w./-]+\.(?:md|csv|json))\b")
_MODULE = re.compile(
    r"(?<![\w/.])((?:lowvram|kernels|quantize|scripts|tests|examples)/[\w./-]+\.py)\b"
)
_LINK = re.compile(r"\]\(([^)#:\s]+)\)")


def citations(text: str) -> Iterator[tuple[str, str]]:
    """(document, section or promise) of every numbered citation in `text`."""
    flat = " ".join(re.sub(r"^\s*#(?!#) ?", "", line).strip() for line in text.splitlines())
    for short, path, numbers in _SECTION.findall(flat):
        for number in re.findall(_NUMBER, numbers):
            yield path or DOCUMENTS[short], number
    for numbers in _PROMISE.findall(flat):
        for number in re.findall(_NUMBER, numbers):
            yield PROMISES, number
    for number in _TEST_NAME.findall(flat):
        yield PROMISES, str(int(number))


@cache
def numbers_of(document: str) -> frozenset[str]:
    """The numbers that headings of a document begin with; of the promises, those of the list."""
    path = ROOT / document
    if not path.is_file():
        return frozenset()
    start = r" {0,1}" if document == PROMISES else r"#+ "
    pattern = rf"^{start}([0-9]+(?:\.[0-9]+|[a-z])?)[.:]? "
    return frozenset(re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE))


def unfounded(text: str) -> list[str]:
    """Citations in `text` that lead nowhere."""
    return [
        f"{document} {number}"
        for document, number in citations(text)
        if number not in numbers_of(document)
    ]


def dead_paths(text: str, document: Path | None = None) -> list[str]:
    """Documents that `text` names by their path from the root, where there is no such file.

    document: where `text` stands in a document, its path; modules and links are looked at too.
    """
    named = _DOCUMENT.findall(text)
    if document is None:
        return [name for name in named if not (ROOT / name).is_file()]
    named += _MODULE.findall(text)
    dead = [name for name in named if not (ROOT / name).is_file()]
    return dead + [link for link in _LINK.findall(text) if not (document.parent / link).exists()]


def files() -> list[Path]:
    """Every .py and .md file of the project, but this one, whose examples are wrong on purpose."""
    found = list(ROOT.glob("*.md"))
    for folder in FOLDERS:
        found += [path for ending in ("py", "md") for path in (ROOT / folder).rglob(f"*.{ending}")]
    return sorted(path for path in found if path != Path(__file__).resolve())


def test_every_citation_has_its_section_or_promise() -> None:
    wrong = {
        path.relative_to(ROOT).as_posix(): missing
        for path in files()
        if (missing := unfounded(path.read_text(encoding="utf-8")))
    }
    assert not wrong, wrong


def test_every_file_that_is_named_exists() -> None:
    wrong = {}
    for path in files():
        text = path.read_text(encoding="utf-8")
        if missing := dead_paths(text, path if path.suffix == ".md" else None):
            wrong[path.relative_to(ROOT).as_posix()] = missing
    assert not wrong, wrong


def test_the_promises_are_numbered_without_a_gap() -> None:
    assert numbers_of(PROMISES) == {str(number) for number in range(1, 34)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(spec 2.1)", [("docs/facts/wan22_spec.md", "2.1")]),
        (
            "(spec sections 1 and 6.1).",
            [("docs/facts/wan22_spec.md", "1"), ("docs/facts/wan22_spec.md", "6.1")],
        ),
        (
            "# of a block (design\n    # section 5), ConvRot; formats 1c,\n",
            [("docs/design.md", "5"), ("docs/facts/formats.md", "1c")],
        ),
        (
            "(kernels 2.1, 2.10)",
            [("docs/facts/kernels.md", "2.1"), ("docs/facts/kernels.md", "2.10")],
        ),
        ("the table of `docs/facts/kernels.md` section\n5.", [("docs/facts/kernels.md", "5")]),
        ("as kernels.md 2.9 says", [("docs/facts/kernels.md", "2.9")]),
        ("Promises 1, 2 and 5: a writer", [(PROMISES, "1"), (PROMISES, "2"), (PROMISES, "5")]),
        ("def test_p07_second_writer", [(PROMISES, "7")]),
        ("kernels 128x128 run, bench_kernels 3, 5 % of it", []),
    ],
)
def test_citations_are_found(text: str, found: list[tuple[str, str]]) -> None:
    assert list(citations(text)) == found
    assert not unfounded(text)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("(spec 2.9)", "docs/facts/wan22_spec.md 2.9"),
        ("spec sections 1 and 66", "docs/facts/wan22_spec.md 66"),
        ("design section\n# 50", "docs/design.md 50"),
        ("formats.md 1z", "docs/facts/formats.md 1z"),
        ("kernels 2.1, 2.11", "docs/facts/kernels.md 2.11"),
        ("`docs/absent.md`, section 1", "docs/absent.md 1"),
        ("promises 33 and 34", "docs/promises.md 34"),
        ("def test_p99_nothing", "docs/promises.md 99"),
    ],
)
def test_a_wrong_citation_is_named(text: str, missing: str) -> None:
    assert unfounded(text) == [missing]


def test_a_file_that_is_not_there_is_named() -> None:
    text = "`docs/absent.md`, docs/design.md, `lowvram/absent.py`, lowvram/units.py, peer/docs/a.md"
    assert dead_paths(text) == ["docs/absent.md"]
    links = "[one](docs/design.md), [two](absent/two.md), [three](https://pytorch.org)"
    assert dead_paths(text + links, ROOT / "README.md") == [
        "docs/absent.md",
        "lowvram/absent.py",
        "absent/two.md",
    ]
