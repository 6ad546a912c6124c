"""Errors of checked JSON name the key, its value and what is expected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import pytest

from lowvram.files.checked import checked


@dataclass(frozen=True)
class Part:
    width: Annotated[int, msgspec.Meta(ge=1, le=100)]
    kind: Literal["wan"] = "wan"


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...] = ()
    named: dict[str, Part] = field(default_factory=dict)


class Closed(msgspec.Struct, forbid_unknown_fields=True):
    width: int = 1


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        ({"width": 0}, Part, "width is 0, expected int >= 1"),
        ({"width": "3"}, Part, "width is '3', expected int"),
        ({"width": 3, "kind": "x"}, Part, "kind is 'x', which this version does not read"),
        ({}, Part, "lacks the key 'width'"),
        ({"parts": [{"width": 1}, {}]}, Whole, "parts[1]: lacks the key 'width'"),
        ({"parts": [{"width": 500}]}, Whole, "parts[0].width is 500, expected int <= 100"),
        ({"named": {"a": {"width": 500}}}, Whole, "named[...].width: expected int <= 100"),
        ({"height": 1}, Closed, "unknown key 'height'"),
        ([], Part, "Expected `object`, got `array`"),
        ({"width": "9" * 500}, Part, f"width is '{'9' * 79}, expected int"),
    ],
)
def test_errors_name_key_value_and_expectation(data: Any, kind: type[Any], text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        checked(data, kind)
    assert str(caught.value) == text


def test_what_fits_is_converted() -> None:
    assert checked({"parts": [{"width": 7}]}, Whole) == Whole((Part(7),))
    assert checked({"width": "7"}, Part, strict=False) == Part(7)
