"""NVML is asked by the card's own name, closed again, and never a reason to fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from lowvram.doctor import measure
from lowvram.hardware import nvml


class Library:
    """pynvml over a card with 3 of 12 GiB in use."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *failing: str) -> None:
        self.failing, self.open = failing, 0

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.failing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return str(self._answer("driver", "576.80"))

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        assert uuid == "GPU-1-2"
        return self._answer("handle", object())

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:
        return self._answer("memory", SimpleNamespace(total=12 << 30, used=3 << 30))


@pytest.mark.parametrize(
    ("failing", "used"), [("", 3 << 30), ("init", None), ("handle", None), ("memory", None)]
)
def test_the_card_is_asked_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch, failing: str, used: int | None
) -> None:
    library = Library(failing)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert nvml.used_bytes("1-2") == nvml.used_bytes("GPU-1-2") == used
    assert library.open == 0


@pytest.mark.parametrize(("failing", "version"), [("", "576.80"), ("driver", None)])
def test_the_driver_is_asked(
    monkeypatch: pytest.MonkeyPatch, failing: str, version: str | None
) -> None:
    library = Library(failing)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert nvml.driver_version() == version
    assert library.open == 0
    monkeypatch.setattr(measure, "NVIDIA_DRIVER", Path("/no/such/file"))
    assert measure.driver_version() == (version or f"CUDA {torch.version.cuda}")


def test_without_the_package_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.used_bytes("1-2") is None
    assert nvml.driver_version() is None


def test_without_a_driver_nothing_is_known() -> None:
    """The real package, on a machine that may have no NVIDIA driver: None or a version."""
    version = nvml.driver_version()
    assert version is None or version[0].isdigit()
