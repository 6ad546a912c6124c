"""Reads of blocks: past the page cache where the system allows, whole wherever they lie, tried
again where the disk fails.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import mmap
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowvram.errors import CheckpointError, InternalLimitError
from lowvram.files import read as disk
from lowvram.planner.workspace import PAGE_BYTES, READ_SLACK_BYTES
from lowvram.streaming.block_file import BlockFile
from tests.helpers.hanging import HangingReads
from tests.helpers.threads import lowvram_threads

SIZES = (256, 4096, 5 * 4096 + 256, 40_960, 3 * 4096 - 256)


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[tuple[BlockFile, list[bytes]]]:
    """Blocks of several sizes at multiples of 256, read in parts of one page; and what they
    hold.
    """
    file, contents = written(tmp_path / "blocks.safetensors")
    yield file, contents
    file.close()


def written(path: Path, part_bytes: int = PAGE_BYTES) -> tuple[BlockFile, list[bytes]]:
    rng = random.Random(0)
    contents = [rng.randbytes(size) for size in SIZES * 4]
    starts, end = [], 768
    for content in contents:
        starts.append(end)
        end += len(content)
    path.write_bytes(bytes(768) + b"".join(contents))
    return BlockFile(
        path,
        [(start, len(content)) for start, content in zip(starts, contents, strict=True)],
        part_bytes,
    ), contents


def room(file: BlockFile, block: int, shift: int = 0) -> torch.Tensor:
    """A buffer as the plan grants it, at any multiple of 64 bytes."""
    return torch.full((file.ranges[block][1] + READ_SLACK_BYTES + shift,), 0x5A, dtype=torch.uint8)[
        shift:
    ]


def read_all(file: BlockFile) -> list[bytes]:
    return [
        bytes(file.read_into(block, room(file, block)).numpy()) for block in range(len(file.ranges))
    ]


@pytest.mark.parametrize("shift", [0, 64, 4032])
def test_every_block_is_read_whole_wherever_it_and_its_buffer_lie(
    blocks: tuple[BlockFile, list[bytes]], shift: int
) -> None:
    file, contents = blocks
    assert len({start % PAGE_BYTES for start, _ in file.ranges}) > 3
    for block, content in enumerate(contents):
        view = file.read_into(block, room(file, block, shift))
        assert bytes(view.numpy()) == content
        assert view.data_ptr() % 256 == file.ranges[block][0] % 256 == 0 or not file.direct


def cached_pages(path: Path) -> int:
    """Pages of the file that the system's cache holds now."""
    length = path.stat().st_size
    with (
        open(path, "r+b") as handle,
        mmap.mmap(handle.fileno(), length, access=mmap.ACCESS_COPY) as view,
    ):
        pages = (ctypes.c_ubyte * (-(-length // mmap.PAGESIZE)))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(length), pages
        )
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages)


def drop_cache(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(path: Path) -> bool:
    """Whether the file system is a tmpfs, whose files are the cache itself."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return max((m for m in mounts if path.is_relative_to(m[1])), key=lambda m: len(m[1]))[2] in (
        "tmpfs",
        "ramfs",
    )


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no page cache to be asked about")
@pytest.mark.parametrize("refused", [False, True])
def test_reading_leaves_nothing_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    if refused:
        refuse_direct_open(monkeypatch)
    file, contents = written(tmp_path / "blocks.safetensors")
    assert file.direct is not refused or in_memory(tmp_path)
    drop_cache(file.path)
    before = cached_pages(file.path)
    assert read_all(file) == contents
    after = cached_pages(file.path)
    file.close()
    assert after <= before


def refuse_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def opened(path: Path, flags: int, *rest: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", opened)


def test_a_file_system_that_refuses_direct_reads_later_is_read_through_the_cache(
    blocks: tuple[BlockFile, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, contents = blocks
    real = BlockFile._pread

    def refusing(self: BlockFile, target: memoryview, offset: int) -> int:
        if self.direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(self, target, offset)

    monkeypatch.setattr(BlockFile, "_pread", refusing)
    assert read_all(file) == contents
    assert not file.direct


def test_windows_has_no_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    file, contents = written(tmp_path / "blocks.safetensors")
    assert read_all(file) == contents
    assert not file.direct
    file.close()


# how often this offset was asked for already -> bytes that come at most, or None for all
Fault = Callable[[int], int | None]


def inject(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    real, tries, lock = BlockFile._pread, Counter[int](), threading.Lock()

    def faulty(self: BlockFile, target: memoryview, offset: int) -> int:
        with lock:
            number, tries[offset] = tries[offset], tries[offset] + 1
        most = fault(number)
        count = real(self, target, offset)
        return count if most is None else min(count, most)

    monkeypatch.setattr(BlockFile, "_pread", faulty)
    monkeypatch.setattr(disk, "RETRY_DELAYS_S", (1e-4, 2e-4, 3e-4))


def eio(times: int) -> Fault:
    def fault(number: int) -> None:
        if number < times:
            raise OSError(errno.EIO, "Input/output error")

    return fault


def nothing_twice(number: int) -> int | None:
    return 0 if number < 2 else None


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "fault",
    [eio(1), eio(3), nothing_twice, lambda number: 5000],
    ids=["EIO once", "EIO 3 times", "nothing", "short"],
)
def test_failing_and_short_reads_are_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    direct: bool,
) -> None:
    """Parts of four pages: short reads inside a part go on where whole pages ended."""
    if not direct:
        refuse_direct_open(monkeypatch)
    file, contents = written(tmp_path / "blocks.safetensors", 4 * PAGE_BYTES)
    inject(monkeypatch, fault)
    with caplog.at_level(logging.WARNING):
        assert read_all(file) == contents
    # reads that only come short go on without a pause
    assert ("trying again in 0.00 s" in caplog.text) is (fault(10) is None)
    file.close()


def test_a_disk_that_keeps_failing_is_named_with_block_and_byte(
    blocks: tuple[BlockFile, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, _ = blocks
    inject(monkeypatch, eio(10**4))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            CheckpointError,
            match=r"blocks.safetensors: reading block 0 at byte \d+ failed: Input/output error, "
            r"4 times",
        ),
    ):
        file.read_into(0, room(file, 0))
    assert len(caplog.records) == len(disk.RETRY_DELAYS_S)


def test_a_truncated_file_is_named_at_once(
    blocks: tuple[BlockFile, list[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    file, contents = blocks
    last = len(contents) - 1
    end = sum(file.ranges[last])
    os.truncate(file.path, end - 100)
    with pytest.raises(
        CheckpointError, match=rf"block {last} ends at byte {end - 100}, expected {end}: truncated"
    ):
        file.read_into(last, room(file, last))
    assert not caplog.records


def test_a_slow_disk_is_named_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, contents = written(tmp_path / "blocks.safetensors")
    monkeypatch.setattr(disk, "SLOW_READ_S", 0.01)
    inject(monkeypatch, lambda number: time.sleep(0.05))
    assert bytes(file.read_into(3, room(file, 3)).numpy()) == contents[3]
    assert "block 3 is not read after 0 s: the disk is slow or busy" in caplog.text
    file.close()


def test_stop_ends_a_read_that_waits_for_its_next_try(
    blocks: tuple[BlockFile, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = blocks
    inject(monkeypatch, eio(10**4))
    monkeypatch.setattr(disk, "RETRY_DELAYS_S", (60.0,))
    ends: list[str] = []

    def read() -> None:
        try:
            file.read_into(3, room(file, 3))
        except CheckpointError as error:
            ends.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.05)
    file.stop()
    reader.join(5)
    assert not reader.is_alive()
    assert "reading block 3 was stopped" in ends[0]
    file.close()
    assert not lowvram_threads()


def test_a_read_without_memory_is_nobodys_fault_and_raised_at_once(
    blocks: tuple[BlockFile, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, contents = blocks

    def no_memory(number: int) -> None:
        if number == 0:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    inject(monkeypatch, no_memory)
    with pytest.raises(OSError, match="Cannot allocate memory") as failed:
        file.read_into(0, room(file, 0))
    assert failed.value.errno == errno.ENOMEM
    assert not caplog.records
    assert bytes(file.read_into(0, room(file, 0)).numpy()) == contents[0]


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (
            errno.EIO,
            CheckpointError,
            r"cannot open .*blocks.safetensors: Input/output error: check the disk",
        ),
        (errno.ENOMEM, OSError, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_file_that_cannot_be_opened_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    expected: type[Exception],
    said: str,
    again: bool,
) -> None:
    """again: when the file system has refused direct reads."""
    file, _ = written(tmp_path / "blocks.safetensors")

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    def refuse_direct(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(BlockFile, "_pread", refuse_direct)
    if again and not file.direct:
        pytest.skip("no direct reads here")
    with pytest.raises(expected, match=said):
        file.read_into(0, room(file, 0)) if again else BlockFile(file.path, file.ranges)
    file.close()


def test_a_disk_that_hangs_is_named_and_waited_for_once(
    blocks: tuple[BlockFile, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = blocks
    disk_hangs = HangingReads(monkeypatch)
    monkeypatch.setattr(disk, "HANGING_READ_S", 1.0)
    began = time.monotonic()
    said = (
        "block 3 cannot be read: the disk gave no byte for 1 s: check the disk",
        "block 2 cannot be read: the disk hangs: check the disk",
    )
    for block, text in zip((3, 2), said, strict=True):
        with pytest.raises(CheckpointError, match=f"blocks.safetensors: {text}"):
            file.read_into(block, room(file, block))
    assert 1 <= time.monotonic() - began < 1.9
    file.close()
    assert time.monotonic() - began < 1.9
    assert lowvram_threads(), "left to themselves"
    disk_hangs.release()


def test_a_disk_that_gives_a_byte_now_and_then_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten parts by four threads, each of 0.2 s: longer in all than the limit, which counts from the
    last byte.
    """
    file, contents = written(tmp_path / "blocks.safetensors")
    monkeypatch.setattr(disk, "HANGING_READ_S", 0.4)
    inject(monkeypatch, lambda number: time.sleep(0.2))
    began = time.monotonic()
    assert bytes(file.read_into(3, room(file, 3)).numpy()) == contents[3]
    assert time.monotonic() - began > 0.4
    file.close()


def test_stop_leaves_a_read_that_hangs_to_itself(
    blocks: tuple[BlockFile, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = blocks
    disk_hangs = HangingReads(monkeypatch)
    monkeypatch.setattr(disk, "STOP_GRACE_S", 0.3)
    ends: list[str] = []
    buffer = room(file, 3)

    def read() -> None:
        try:
            file.read_into(3, buffer)
        except CheckpointError as error:
            ends.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    assert disk_hangs.begun.wait(5)
    file.stop()
    reader.join(5)
    assert not reader.is_alive()
    assert ends == [f"{file.path}: block 3 is not read: it was stopped while the disk gave nothing"]
    file.close()
    disk_hangs.release()
    file.close()


def test_a_file_that_nobody_closes_leaves_no_thread(tmp_path: Path) -> None:
    file, contents = written(tmp_path / "blocks.safetensors")
    assert bytes(file.read_into(3, room(file, 3)).numpy()) == contents[3]
    assert lowvram_threads()
    descriptor = file._fd
    del file
    gc.collect()
    os.close(descriptor)
    until = time.monotonic() + 5
    while lowvram_threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert not lowvram_threads()


def test_a_buffer_without_slack_is_refused(blocks: tuple[BlockFile, list[bytes]]) -> None:
    file, _ = blocks
    with pytest.raises(InternalLimitError, match=r"too small for block 2 of .* and page alignment"):
        file.read_into(2, torch.empty(file.ranges[2][1] - 1, dtype=torch.uint8))


def test_several_threads_read_the_parts_of_one_block(
    blocks: tuple[BlockFile, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, contents = blocks
    names: set[str] = set()
    together = threading.Barrier(2)

    counting = threading.Lock()

    def meet(number: int) -> None:
        name = threading.current_thread().name
        with counting:
            waits = name not in names and len(names) < 2
            names.add(name)
        if waits:
            together.wait(5)  # breaks where one thread reads one part after the other

    inject(monkeypatch, meet)
    assert bytes(file.read_into(3, room(file, 3)).numpy()) == contents[3]
    assert len(names) > 1
