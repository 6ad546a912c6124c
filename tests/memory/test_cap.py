"""The hard limit on a GPU's memory, with the driver played by a fake."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowvram.memory.cap import vram_cap

GPU = torch.device("cuda")


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every share that was set, the last one in force; at first the whole device of 1,000 bytes."""
    found = [1.0]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def of_a_numbered_device(device: object) -> None:
        if not isinstance(device, int):
            raise ValueError("torch takes no device without a number here")

    def get(device: object) -> float:
        of_a_numbered_device(device)
        return found[-1]

    def put(share: float, device: object) -> None:
        of_a_numbered_device(device)
        found.append(share)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", get)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", put)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000)
    )
    return found


def test_p17_torch_is_held_to_the_budget_and_let_go_however_the_run_ends(
    shares: list[float],
) -> None:
    with vram_cap(GPU, 250):
        assert shares[-1] == 0.25
    assert shares[-1] == 1.0
    with pytest.raises(ValueError, match="stop"), vram_cap(GPU, 250):
        raise ValueError("stop")
    assert shares[-1] == 1.0


def test_a_tighter_limit_stays(shares: list[float]) -> None:
    shares.append(0.1)
    with vram_cap(GPU, 250):
        assert shares[-1] == 0.1
    assert shares[-1] == 0.1


def test_a_budget_above_the_device_and_one_below_the_context_are_shares_too(
    shares: list[float],
) -> None:
    for nbytes, share in ((5000, 1.0), (-1, 0.0)):
        with vram_cap(GPU, nbytes):
            assert shares[-1] == share


def test_a_cpu_has_no_cap(shares: list[float]) -> None:
    with vram_cap(torch.device("cpu"), 250):
        assert shares == [1.0]


def test_what_torch_keeps_already_belongs_to_the_context(
    shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS keeps its workspace in torch's allocator."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 34)
    with vram_cap(GPU, 250):
        assert shares[-1] == 0.284
