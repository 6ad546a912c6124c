"""What the Python interface refuses: a wrong type or range, by an error that names the field, the
value and what is expected.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lowvram.errors import LowvramError, UsageError
from lowvram.hardware import budgets as budget
from lowvram.hardware.budgets import amount_bytes, resolve_budgets
from lowvram.request import MAX_STEPS, Request, check_clip
from lowvram.sigmas import NUM_TRAIN_TIMESTEPS
from lowvram.units import clip_size, parse_bytes, parse_size

HUGE = 10**5000  # Python refuses to print it


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": None}, "prompt is None: expected text"),
        ({"prompt": b"a circle"}, "prompt is b'a circle': expected text"),
        ({"prompt": "a \udcff"}, r"prompt holds '\udcff' at character 3: expected Unicode text"),
        ({"negative_prompt": 5}, "negative_prompt is 5: expected text"),
        ({"solver": ["unipc"]}, "solver is ['unipc']: expected text"),
        ({"width": 64.0}, "width is 64.0: expected an integer"),
        ({"height": "64"}, "height is '64': expected an integer"),
        ({"num_frames": "5"}, "frames is '5': expected an integer"),
        ({"num_frames": None}, "frames is None: expected an integer"),
        ({"steps": 2.5}, "steps is 2.5: expected an integer"),
        ({"steps": True}, "steps is True: expected an integer"),
        ({"steps": -1}, "steps -1 is less than 1"),
        (
            {"steps": 1001},
            "steps 1001 is more than the 1000 timesteps that the model knows: use 1000 at most",
        ),
        ({"fps": 16.0}, "fps is 16.0: expected an integer"),
        ({"seed": 1.5}, "seed is 1.5: expected an integer"),
        ({"seed": "a"}, "seed is 'a': expected an integer"),
        ({"seed": 2**63}, "seed 9223372036854775808 is outside"),
        ({"seed": HUGE}, "seed is an integer of 16610 bits: expected an integer"),
        ({"width": 16 * HUGE}, "width is an integer of 16614 bits"),
        ({"shift": "12"}, "shift is '12': expected a number"),
        ({"shift": HUGE}, "shift is an integer of 16610 bits: expected a number"),
        ({"guidance_high": "a"}, "guidance_high is 'a': expected a number"),
        ({"guidance_low": False}, "guidance_low is False: expected a number"),
        ({"boundary": None}, "boundary is None: expected a number"),
        ({"boundary": float("nan")}, "boundary nan is outside 0 .. 1"),
    ],
)
def test_a_request_names_the_field_the_value_and_what_is_expected(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        Request(**{"prompt": "a circle", **changes})


def test_whole_numbers_are_numbers_and_the_limits_are_allowed() -> None:
    assert Request("a circle", guidance_high=4, shift=12, boundary=1) == Request(
        "a circle", guidance_high=4.0, shift=12.0, boundary=1.0
    )
    assert Request("a circle", steps=1000, seed=2**63 - 1).steps == MAX_STEPS
    check_clip(16, 16, 1, 1)


def test_the_steps_are_those_that_the_schedule_can_tell_apart() -> None:
    assert MAX_STEPS == NUM_TRAIN_TIMESTEPS


@pytest.mark.parametrize(
    ("wrong", "near"), [(1, 16), (23, 16), (25, 32), (70, 64), (73, 80), (830, 832)]
)  # fmt: skip
def test_the_size_proposed_is_the_nearest(wrong: int, near: int) -> None:
    with pytest.raises(
        UsageError, match=f"height {wrong} is not a positive multiple of 16: use {near}$"
    ):
        check_clip(16, wrong, 1, 1)


@pytest.mark.parametrize(
    ("wrong", "near"), [(-3, 1), (0, 1), (2, 1), (4, 5), (6, 5), (8, 9), (80, 81)]
)
def test_the_length_proposed_is_the_nearest(wrong: int, near: int) -> None:
    with pytest.raises(UsageError, match=f"frames {wrong} is not 4n.1: use {near}$"):
        check_clip(16, 16, wrong, 1)


def test_a_size_is_a_pair_or_text() -> None:
    assert clip_size("64x48") == clip_size((64, 48)) == clip_size([64, 48]) == (64, 48)
    for wrong in ((64,), (64, 48, 3), 64, {64: 48}, b"64x48"):
        with pytest.raises(
            UsageError,
            match=rf"size is {re.escape(repr(wrong))}: expected \(width, height\) or text like "
            rf"832x480",
        ):
            clip_size(wrong)  # type: ignore[arg-type]
    for text in ("64", "9" * 5000 + "x64"):
        with pytest.raises(UsageError, match="832x480"):
            parse_size(text)


@pytest.mark.parametrize(
    "amount",
    [
        -5,
        0,
        1.5,
        True,
        None,
        [8],
        "0GiB",
        "-5",
        "lots",
        "",
        2**63,
        pytest.param(HUGE, id="huge"),
        pytest.param("9" * 400, id="long"),
    ],
)
@pytest.mark.parametrize("label", ["VRAM", "RAM"])
def test_a_budget_is_a_positive_amount(amount: Any, label: str) -> None:
    with pytest.raises(UsageError, match="8GiB"):
        amount_bytes(label, amount)
    budgets = {"VRAM": (amount, "auto"), "RAM": ("auto", amount)}[label]
    with pytest.raises(UsageError, match="8GiB"):
        resolve_budgets(*budgets, "cpu")


def test_an_amount_is_bytes_or_text() -> None:
    assert amount_bytes("RAM", 8 * 2**30) == amount_bytes("RAM", "8GiB") == parse_bytes("8GiB")
    with pytest.raises(
        UsageError, match=re.escape("the VRAM budget is 1.5: expected a positive number of bytes")
    ):
        amount_bytes("VRAM", 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "device", ["tpu", "cuda:abc", "cuda:", "cuda:-1", "cuda:01", "cuda:0 ", "cuda0", "", 0, None]
)
def test_an_unknown_device_is_answered_with_those_that_there_are(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UsageError, match=re.escape(f"unknown device {device!r}: available are auto, cpu") + "$"
    ):
        resolve_budgets("auto", "auto", device)


def test_a_gpu_that_is_not_there_is_answered_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda number: ("RTX 3060", "RTX 4090")[number]
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 12 * 2**30))
    monkeypatch.setattr(budget, "_context", lambda device: None)
    for device, start in (
        ("cuda:9", "there is no device cuda:9"),
        ("cuda:2", "there is no device cuda:2"),
        ("cuda:abc", "unknown device"),
    ):
        with pytest.raises(
            UsageError,
            match=f"^{start}.*: available are auto, cpu, cuda:0 .RTX 3060., cuda:1 .RTX 4090.$",
        ):
            resolve_budgets("auto", "auto", device)
    for device, taken in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert resolve_budgets("auto", "auto", device).device == taken


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_a_gpu_none_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LowvramError, match=f"device {device}: torch finds no GPU: use auto or cpu"):
        resolve_budgets("auto", "auto", device)
