"""Slots: never reused early, never a wasted read; failures reach the thread that computes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowvram.errors import CheckpointError, InternalLimitError
from lowvram.memory.arena import Ledger
from lowvram.planner.workspace import READ_SLACK_BYTES
from lowvram.streaming.block_file import BlockFile
from lowvram.streaming.schedule import BlockId, assign_slots
from lowvram.streaming.slots import Slots
from lowvram.streaming.streamer import StreamedComponent, Streamer
from lowvram.streaming.transport import HostTransport
from tests.helpers.runs import CPU
from tests.helpers.threads import lowvram_threads

BLOCKS, NBYTES = 5, 1024
SLOT_BYTES = NBYTES + READ_SLACK_BYTES
TENSORS = {"weight": (torch.uint8, (NBYTES,), 0)}


def write_blocks(folder: Path, name: str, first: int) -> BlockFile:
    path = folder / name
    path.write_bytes(b"".join(bytes([first + index]) * NBYTES for index in range(BLOCKS)))
    return BlockFile(path, [(index * NBYTES, NBYTES) for index in range(BLOCKS)])


def two_experts(steps: int, switch: int) -> list[BlockId]:
    return [
        ("high" if step < switch else "low", index)
        for step in range(steps)
        for index in range(BLOCKS)
    ]


class StagedTransport(HostTransport):
    """Host memory that is reached as a GPU is: through staging buffers."""

    staged = True


class SlowTransport(StagedTransport):
    """Copies in pieces with pauses, so that a slot overwritten too early is seen."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def copy(self, host: torch.Tensor, slot: torch.Tensor, after: object | None) -> None:
        middle = host.numel() // 2
        slot[:middle].copy_(host[:middle])
        time.sleep(self._rng.random() * 2e-4)
        slot[middle : host.numel()].copy_(host[middle:])


def run(
    folder: Path,
    choice: tuple[int, int, int],
    schedule: list[BlockId],
    transport: HostTransport,
    pause: Callable[[], float],
    pinned: int = 0,
    staging_buffers: int = 2,
) -> int:
    """Walks the schedule, checks every byte of every block at the start and at the end of its
    visit; returns the bytes read.
    """
    resident, ring, host = choice
    staging_buffers = staging_buffers if transport.staged else 0
    files = {"high": write_blocks(folder, "high", 1), "low": write_blocks(folder, "low", 101)}
    ledger = Ledger("test", 10**6)
    slots = Slots("slot", resident + ring, SLOT_BYTES, ledger, CPU)
    cached, staging = (
        Slots("cached", host, SLOT_BYTES, ledger, CPU),
        Slots("staging", staging_buffers, SLOT_BYTES, ledger, CPU),
    )
    cached.pin(pinned, transport)
    visits = assign_slots(schedule, resident, ring, host, staging_buffers, cached.pinned)
    components = {name: StreamedComponent(file, TENSORS) for name, file in files.items()}
    with Streamer(components, visits, slots, cached, staging, transport) as streamer:
        for name, index in schedule:
            with streamer.block(name, index) as block:
                expected = (1 if name == "high" else 101) + index
                assert set(block["weight"].tolist()) == {expected}
                time.sleep(pause())
                assert set(block["weight"].tolist()) == {expected}
    for file in files.values():
        file.close()
    return streamer.read_bytes


@pytest.mark.parametrize("seed", range(40))
def test_slots_are_never_reused_early(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    resident = rng.randint(0, BLOCKS)
    ring = rng.randint(1, 3) if resident < BLOCKS else 0
    choice = (resident, ring, rng.randint(0, BLOCKS - resident))
    transport = SlowTransport(rng) if seed % 2 else HostTransport()
    schedule, pinned, staging = (
        two_experts(4, rng.randint(0, 4)),
        rng.randint(0, choice[2]),
        rng.randint(1, 3),
    )
    run(tmp_path, choice, schedule, transport, lambda: rng.random() * 2e-4, pinned, staging)


def test_a_planted_early_reuse_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: without the wait for the slot's last visit it does."""
    to_device = Streamer._to_device
    monkeypatch.setattr(
        Streamer,
        "_to_device",
        lambda self, number, visit: to_device(self, number, replace(visit, after=-1)),
    )
    with pytest.raises(AssertionError):
        run(tmp_path, (0, 2, 0), two_experts(4, 2), HostTransport(), lambda: 2e-3)


def test_residents_and_cached_blocks_are_read_once_per_expert(tmp_path: Path) -> None:
    steps = 6
    everything = run(tmp_path, (BLOCKS, 0, 0), two_experts(steps, 3), HostTransport(), lambda: 0.0)
    assert everything == 2 * BLOCKS * NBYTES
    cached = run(tmp_path, (2, 1, 3), two_experts(steps, 3), HostTransport(), lambda: 0.0)
    assert cached == 2 * BLOCKS * NBYTES
    from_disk = run(tmp_path, (0, 2, 0), two_experts(steps, 3), HostTransport(), lambda: 0.0)
    assert from_disk == steps * BLOCKS * NBYTES


def test_the_next_block_travels_while_this_one_computes(tmp_path: Path) -> None:
    """Also across the expert switch: the low expert's first block is in its slot before the last
    visit of the high one ends.
    """
    files = {"high": write_blocks(tmp_path, "high", 1), "low": write_blocks(tmp_path, "low", 101)}
    ledger = Ledger("test", 10**6)
    slots, staging = (
        Slots("slot", 2, SLOT_BYTES, ledger, CPU),
        Slots("staging", 2, SLOT_BYTES, ledger, CPU),
    )
    schedule = two_experts(2, 1)
    components = {name: StreamedComponent(file, TENSORS) for name, file in files.items()}
    none = Slots("none", 0, NBYTES, ledger, CPU)
    with Streamer(
        components, assign_slots(schedule, 0, 2, 0, 2), slots, none, staging, StagedTransport()
    ) as streamer:
        for number, (name, index) in enumerate(schedule[:-1]):
            with streamer.block(name, index):
                following = schedule[number + 1]
                expected = (1 if following[0] == "high" else 101) + following[1]
                slot = slots[(number + 1) % 2][:NBYTES]
                deadline = time.monotonic() + 5
                while set(slot.tolist()) != {expected} and time.monotonic() < deadline:
                    time.sleep(1e-3)
                assert set(slot.tolist()) == {expected}


def test_a_failing_read_names_file_and_block(tmp_path: Path) -> None:
    file = write_blocks(tmp_path, "high", 1)
    with open(tmp_path / "high", "r+b") as handle:
        handle.truncate(3 * NBYTES + 10)
    ledger = Ledger("test", 10**6)
    slots, none = Slots("slot", 2, SLOT_BYTES, ledger, CPU), Slots("none", 0, NBYTES, ledger, CPU)
    schedule = [("high", index) for index in range(BLOCKS)]
    streamed = {"high": StreamedComponent(file, TENSORS)}
    with Streamer(
        streamed, assign_slots(schedule, 0, 2, 0), slots, none, none, HostTransport()
    ) as streamer:
        for index in range(3):
            with streamer.block("high", index):
                pass
        with (
            pytest.raises(CheckpointError, match=r"high: block 3 ends at byte 3082, expected 4096"),
            streamer.block("high", 3),
        ):
            pass
    file.close()
    assert not lowvram_threads()


def test_asking_out_of_order_is_refused(tmp_path: Path) -> None:
    file = write_blocks(tmp_path, "high", 1)
    ledger = Ledger("test", 10**6)
    slots, none = Slots("slot", 1, NBYTES, ledger, CPU), Slots("none", 0, NBYTES, ledger, CPU)
    with (
        Streamer(
            {"high": StreamedComponent(file, TENSORS)},
            assign_slots([("high", 0)], 0, 1, 0),
            slots,
            none,
            none,
            HostTransport(),
        ) as streamer,
        pytest.raises(InternalLimitError, match="schedule's visit 0"),
        streamer.block("high", 1),
    ):
        pass


def test_a_ledger_refuses_more_than_planned() -> None:
    ledger = Ledger("VRAM", 1000)
    ledger.allocate("first", 600, CPU)
    with pytest.raises(InternalLimitError, match="600 of the planned 1000"):
        ledger.allocate("second", 600, CPU)


@pytest.mark.parametrize("choice", [(0, 2, 0), (1, 1, 2), (BLOCKS, 0, 0)])
@pytest.mark.parametrize("staged", [False, True])
def test_p26_no_block_is_computed_or_overwritten_before_it_is_compared(
    tmp_path: Path, choice: tuple[int, int, int], staged: bool
) -> None:
    """Comparisons that are slow still see the block as it was read, once each, before its visit."""
    compared: list[tuple[str, int]] = []

    def checks_of(name: str, first: int) -> Callable[[int, torch.Tensor], list[Callable[[], None]]]:
        def check(index: int, data: torch.Tensor) -> None:
            for _ in range(3):
                assert set(data.tolist()) == {first + index}
                time.sleep(1e-3)
            compared.append((name, index))

        return lambda index, data: [lambda: check(index, data)]

    resident, ring, host = choice
    transport = StagedTransport() if staged else HostTransport()
    staging_buffers = 2 if staged else 0
    firsts = {"high": 1, "low": 101}
    files = {name: write_blocks(tmp_path, name, first) for name, first in firsts.items()}
    ledger = Ledger("test", 10**6)
    slots, cached, staging = (
        Slots(label, count, SLOT_BYTES, ledger, CPU)
        for label, count in (
            ("slot", resident + ring),
            ("cached", host),
            ("staging", staging_buffers),
        )
    )
    schedule = two_experts(4, 2)
    visits = assign_slots(schedule, resident, ring, host, staging_buffers)
    components = {
        name: StreamedComponent(file, TENSORS, lambda index: False, checks_of(name, firsts[name]))
        for name, file in files.items()
    }
    with Streamer(components, visits, slots, cached, staging, transport) as streamer:
        for name, index in schedule:
            with streamer.block(name, index):
                assert (name, index) in compared
    assert sorted(compared) == sorted(set(schedule)), "once each"
    for file in files.values():
        file.close()


def test_p26_a_damaged_block_fails_where_it_is_asked_for(tmp_path: Path) -> None:
    def damaged() -> None:
        raise CheckpointError("block 2 is damaged")

    file = write_blocks(tmp_path, "high", 1)
    ledger = Ledger("test", 10**6)
    slots = Slots("slot", 2, SLOT_BYTES, ledger, CPU)
    none = Slots("none", 0, SLOT_BYTES, ledger, CPU)
    schedule = [("high", index) for index in range(BLOCKS)] * 2
    component = StreamedComponent(
        file,
        TENSORS,
        lambda index: index != 2,
        lambda index, data: [damaged] if index == 2 else [],
    )
    with Streamer(
        {"high": component}, assign_slots(schedule, 0, 2, 0), slots, none, none, HostTransport()
    ) as streamer:
        for index in range(2):
            with streamer.block("high", index):
                pass
        with pytest.raises(CheckpointError, match="block 2 is damaged"), streamer.block("high", 2):
            pass
    file.close()
    assert not lowvram_threads()
