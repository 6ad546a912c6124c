"""Locking pages for a CUDA device, through a driver that can refuse: what it answers is heard, and its errors do not stay behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lowvram.streaming.transport import CudaTransport, HostTransport, make_transport

DEVICE = torch.device("cuda", 1)


class Driver:
    """Stands for CUDA's runtime: codes for the next calls, the error that a launch's check would find, the device that is current."""

    def __init__(self) -> None:
        self.register = self.unregister = self.last_error = self.current = 0
        self.calls: list[tuple[str, int, int]] = []  # (call, address, the device current then)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return self._answer("register", address, self.register)

    def cudaHostUnregister(self, address: int) -> int:
        return self._answer("unregister", address, self.unregister)

    def _answer(self, call: str, address: int, code: int) -> int:
        self.calls.append((call, address, self.current))
        self.last_error = code or self.last_error
        return code

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def launch(self, size: int, *, device: torch.device) -> None:
        """A kernel, whose check takes the last error off and raises it."""
        assert device == DEVICE
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error: {error}")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    stream: Callable[[Any], object] = lambda device: object()  # noqa: E731
    for name, value in {"cudart": lambda: driver, "device": driver.device, "Stream": stream, "current_stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", driver.launch)
    return driver


BUFFER = torch.empty(4096, dtype=torch.uint8)


def test_pages_are_locked_and_unlocked_on_the_device_of_the_run(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    transport = make_transport(DEVICE)
    assert isinstance(transport, CudaTransport)
    assert transport.pin(BUFFER)
    transport.unpin(BUFFER)
    assert driver.calls == [("register", BUFFER.data_ptr(), 1), ("unregister", BUFFER.data_ptr(), 1)]
    assert driver.current == 0
    assert not caplog.records


def test_a_refusal_to_lock_is_heard_and_leaves_no_error(driver: Driver) -> None:
    driver.register = 1
    assert not CudaTransport(DEVICE).pin(BUFFER)
    assert driver.last_error == 0


def test_a_refusal_to_unlock_is_said_and_leaves_no_error(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    transport = CudaTransport(DEVICE)
    assert transport.pin(BUFFER)
    driver.unregister = 713
    with caplog.at_level(logging.WARNING):
        transport.unpin(BUFFER)
    assert driver.last_error == 0, "the next kernel would raise it"
    assert "4096 bytes" in caplog.text
    assert "713" in caplog.text


def test_a_host_needs_no_locked_pages() -> None:
    transport = make_transport(torch.device("cpu"))
    assert isinstance(transport, HostTransport)
    assert transport.pin(BUFFER)
    transport.unpin(BUFFER)
