"""Limits of control groups from made-up trees, and the doctor's findings from made-up machines."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from lowvram.doctor import read_speed as read_speed_module
from lowvram.doctor.read_speed import read_speed
from lowvram.doctor.report import doctor_report
from lowvram.errors import CheckpointError
from lowvram.hardware import machine as machine_module
from lowvram.hardware.cgroups import cpu_count, free_ram_bytes, host_memory, total_ram_bytes
from lowvram.hardware.machine import (
    Gpu,
    Machine,
    disk_free,
    find_gpu,
    probe_machine,
    why_triton_fails,
)
from lowvram.streaming import block_file as source

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert memory.limited_by == "machine"


def test_version_2_limit_counts_without_reclaimable_file_pages(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a.slice/b.scope\n",
            "sys/fs/cgroup/a.slice/b.scope/memory.max": f"{300 * MIB}\n",
            "sys/fs/cgroup/a.slice/b.scope/memory.current": f"{200 * MIB}\n",
            "sys/fs/cgroup/a.slice/b.scope/memory.stat": f"anon 5\ninactive_file "
            f"{30 * MIB}\nactive_file {20 * MIB}\n",
        },
    )
    assert dataclasses.astuple(host_memory(tmp_path)) == (300 * MIB, 150 * MIB, "cgroup v2")


def test_a_limit_further_up_counts_too(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a.slice/b.scope\n",
            "sys/fs/cgroup/a.slice/b.scope/memory.max": "max\n",
            "sys/fs/cgroup/a.slice/b.scope/memory.current": "1\n",
            "sys/fs/cgroup/a.slice/memory.max": f"{100 * MIB}\n",
            "sys/fs/cgroup/a.slice/memory.current": f"{120 * MIB}\n",
        },
    )
    assert dataclasses.astuple(host_memory(tmp_path)) == (100 * MIB, 0, "cgroup v2")


def test_version_1_limit_where_the_path_is_that_of_the_host(tmp_path: Path) -> None:
    """In a container /proc names the host's path, but the group is mounted at the root."""
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{400 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {10 * MIB}\n",
        },
    )
    assert dataclasses.astuple(host_memory(tmp_path)) == (400 * MIB, 310 * MIB, "cgroup v1")


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert host_memory(tmp_path).limited_by == "machine"


@pytest.mark.parametrize("content", ["", "garbage", "0::", "::::", "4:memory:/../../..\n"])
def test_garbage_is_no_limit(tmp_path: Path, content: str) -> None:
    tree(
        tmp_path, {"proc/self/cgroup": content, "sys/fs/cgroup/memory.max": "none of your business"}
    )
    assert host_memory(tmp_path).limited_by == "machine"
    assert cpu_count(tmp_path) >= 1


@pytest.mark.parametrize(
    ("quota", "count"),
    [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("100000000 100000", None)],
)
def test_processors_are_limited_by_the_quota(tmp_path: Path, quota: str, count: int | None) -> None:
    unlimited = cpu_count(tree(tmp_path / "a", {"proc/self/cgroup": ""}))
    limited = cpu_count(
        tree(tmp_path / "b", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
    )
    assert limited == (count or unlimited)


def test_the_real_machine() -> None:
    assert 0 < free_ram_bytes() <= total_ram_bytes() <= psutil.virtual_memory().total
    machine = probe_machine(Path(__file__).parent)
    assert machine.disk_read_bytes_s is None
    assert machine.cpu_count >= 1
    assert (machine.gpu is None) == bool(machine.gpu_reason)
    assert machine.triton_works == (not machine.triton_reason)
    assert machine.versions["torch"]
    json.dumps(machine.to_dict())


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "a" / "b") == pytest.approx(disk_free(tmp_path), rel=0.05)


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_speed_module, "PROBE_BLOCKS", 2)
    monkeypatch.setattr(read_speed_module, "PROBE_BLOCK_BYTES", MIB)
    monkeypatch.setattr(source, "PART_BYTES", MIB // 4)
    part_bytes, *others = source.BlockFile.__init__.__defaults__ or ()
    assert part_bytes > MIB // 4
    monkeypatch.setattr(source.BlockFile.__init__, "__defaults__", (MIB // 4, *others))


@pytest.mark.usefixtures("small_probe")
def test_disk_speed_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = read_speed(tmp_path)
    assert speed is None if not hasattr(os, "posix_fadvise") else speed is not None and speed > 0
    assert read_speed(tmp_path / "missing") is None
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(
        source.BlockFile,
        "read_into",
        lambda *_: (_ for _ in ()).throw(CheckpointError("a bad sector")),
    )
    assert read_speed(tmp_path) is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert read_speed(tmp_path) is None
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="measures only where the page cache can be emptied"
)
@pytest.mark.usefixtures("small_probe")
def test_the_disk_is_read_as_the_streamer_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its reader's threads, part by part, into a buffer with the slack of aligned reads, past
    the page cache where the system can.
    """
    parts: list[tuple[str, int, int]] = []
    opened: list[bool] = []
    lock, real, init = threading.Lock(), os.preadv, source.BlockFile.__init__

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        with lock:
            parts.append((threading.current_thread().name, offset, len(buffers[0])))
        return real(fd, buffers, offset)

    def opening(file: source.BlockFile, *arguments: Any, **settings: Any) -> None:
        init(file, *arguments, **settings)
        opened.append(file.direct)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(source.BlockFile, "__init__", opening)
    assert read_speed(tmp_path)
    assert len(opened) == 1
    assert all(name.startswith("lowvram-reader") for name, _, _ in parts)
    assert len({name for name, _, _ in parts}) > 1
    assert sorted({offset for _, offset, _ in parts}) == [index * MIB // 4 for index in range(8)]
    assert {nbytes for _, _, nbytes in parts} == {MIB // 4}


@pytest.mark.usefixtures("small_probe")
def test_a_full_disk_is_not_filled_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * MIB))
    monkeypatch.setattr(read_speed_module, "_write", lambda place: pytest.fail("written"))
    assert read_speed(tmp_path) is None


def test_the_disk_is_measured_by_what_the_caller_names(tmp_path: Path) -> None:
    asked: list[Path] = []

    def disk_speed(folder: Path) -> float:
        asked.append(folder)
        return 123e6

    measured = probe_machine(tmp_path, measure=True, disk_speed=disk_speed)
    assert (measured.disk_read_bytes_s, asked) == (123e6, [tmp_path])
    assert (
        probe_machine(tmp_path, disk_speed=lambda folder: pytest.fail("measured")).disk_read_bytes_s
        is None
    )


def test_a_torch_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu, reason = find_gpu()
    assert gpu is None
    assert "torch does not load" in reason
    assert "Triton does not load" in why_triton_fails(has_gpu=True)


class FakeProperties:
    name, major, minor = "NVIDIA GeForce RTX 3060", 8, 6


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: FakeProperties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (11 << 30, 12 << 30))


@pytest.mark.usefixtures("fake_gpu")
def test_a_gpu_is_described() -> None:
    assert find_gpu() == (Gpu("NVIDIA GeForce RTX 3060", 12 << 30, 11 << 30, (8, 6), "sm_86"), "")


@pytest.mark.usefixtures("fake_gpu")
def test_a_gpu_that_does_not_answer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> tuple[int, int]:
        raise RuntimeError("CUDA error:\nout of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert find_gpu() == (None, "the GPU does not respond: CUDA error: out of memory")


@pytest.mark.usefixtures("fake_gpu")
def test_a_link_that_cannot_be_measured_leaves_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where WSL2 or little RAM lets no 256 MiB be page-locked."""

    def fails() -> float:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(machine_module, "_link_speed", fails)
    gpu, reason = find_gpu(measure=True)
    assert (gpu, reason) == (
        Gpu("NVIDIA GeForce RTX 3060", 12 << 30, 11 << 30, (8, 6), "sm_86", None),
        "",
    )
    assert (
        "could not measure the speed of the link to the GPU: CUDA error: out of memory"
        in caplog.text
    )


def test_a_driver_that_triton_cannot_use_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Active:
        def get_current_target(self) -> object:
            raise RuntimeError("Failed to find C compiler")

    runtime = SimpleNamespace(driver=SimpleNamespace(active=Active()))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(runtime=runtime))
    assert why_triton_fails(has_gpu=True) == "Triton's driver fails: Failed to find C compiler"
    assert why_triton_fails(has_gpu=False) == "there is no GPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_gpu_is_measured() -> None:
    gpu, reason = find_gpu(measure=True)
    assert gpu is not None, reason
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.link_bytes_s is not None
    assert gpu.link_bytes_s > 1e9


def test_importing_the_probe_loads_no_torch() -> None:
    code = (
        "import sys, lowvram.doctor.report; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = Machine(
    system="Linux x86_64",
    python="3.11.7",
    cpu_count=8,
    ram_total_bytes=32 << 30,
    ram_free_bytes=24 << 30,
    ram_limited_by="machine",
    gpu=Gpu("NVIDIA GeForce RTX 3060", 12 << 30, 11 << 30, (8, 6), "sm_86", 12e9),
    gpu_reason="",
    disk_free_bytes=500 << 30,
    disk_read_bytes_s=3.5e9,
    triton_works=True,
    triton_reason="",
    versions=dict.fromkeys(machine_module.PACKAGES, "1.0"),
)


def finding(name: str, **changes: Any) -> dict[str, str]:
    report = doctor_report(Path("folder"), dataclasses.replace(GOOD, **changes))
    return next(found for found in report["findings"] if found["name"] == name)


def test_a_good_machine_has_nothing_to_do() -> None:
    report = doctor_report(Path("folder"), GOOD)
    assert report["ok"] is True
    assert [found["status"] for found in report["findings"]] == ["ok"] * len(report["findings"])
    assert not any(found["advice"] for found in report["findings"])
    assert report["machine"]["gpu"]["name"] == "NVIDIA GeForce RTX 3060"
    json.dumps(report)


OLD_GPU = Gpu("NVIDIA GeForce GTX 1080", 8 << 30, 7 << 30, (6, 1), "sm_61")
FULL_GPU = dataclasses.replace(OLD_GPU, capability=(8, 6), architecture="sm_86", free_bytes=1 << 30)


@pytest.mark.parametrize(
    ("name", "changes", "status", "word"),
    [
        (
            "GPU",
            {"gpu": None, "gpu_reason": "torch 2.13.0+cpu is built without GPU support"},
            "warn",
            "install torch",
        ),
        (
            "GPU",
            {"gpu": None, "gpu_reason": "torch finds no GPU: is its driver installed?"},
            "warn",
            "driver",
        ),
        ("GPU", {"gpu": OLD_GPU}, "warn", "RTX 30"),
        ("GPU", {"gpu": FULL_GPU}, "warn", "close other programs that use the GPU"),
        (
            "Triton",
            {"triton_works": False, "triton_reason": "Triton does not load"},
            "warn",
            "C compiler",
        ),
        ("RAM", {"ram_free_bytes": 1 << 30}, "warn", "close other programs"),
        ("disk room", {"disk_free_bytes": 1 << 30}, "warn", "free some space"),
        ("disk room", {"disk_free_bytes": None}, "warn", "exists"),
        ("disk speed", {"disk_read_bytes_s": 1e8}, "warn", "NVMe"),
        ("packages", {"versions": GOOD.versions | {"diffusers": None}}, "missing", "bootstrap"),
    ],
)
def test_what_is_wrong_comes_with_advice(
    name: str, changes: dict[str, object], status: str, word: str
) -> None:
    found = finding(name, **changes)
    assert found["status"] == status
    assert word in found["advice"]


def test_a_missing_package_is_not_ok() -> None:
    assert (
        doctor_report(
            Path("folder"), dataclasses.replace(GOOD, versions=GOOD.versions | {"av": None})
        )["ok"]
        is False
    )


def test_the_limit_of_a_container_is_named() -> None:
    assert "cgroup v2" in finding("RAM", ram_limited_by="cgroup v2")["detail"]


def test_triton_is_not_missed_without_a_gpu() -> None:
    found = finding(
        "Triton", gpu=None, gpu_reason="none", triton_works=False, triton_reason="no module"
    )
    assert (found["status"], found["advice"]) == ("ok", "")


def test_the_probe_of_the_link_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps freed page-locked memory in a cache of its own: emptied once the buffers are
    gone.
    """
    made: list[weakref.ref[torch.UntypedStorage]] = []
    emptied: list[str] = []

    def buffer(*arguments: object, **settings: object) -> torch.Tensor:
        tensor = torch.zeros(64, dtype=torch.uint8)
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def empty(name: str) -> None:
        assert [storage() for storage in made] == [None, None], (
            "buffers still held are not handed back"
        )
        emptied.append(name)

    monkeypatch.setattr(torch, "empty", buffer)
    monkeypatch.setattr(torch, "empty_like", buffer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: empty("device"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: empty("host"), raising=False)
    assert machine_module._link_speed() > 0
    assert emptied == ["host", "device"]
    monkeypatch.delattr(torch._C, "_host_emptyCache")
    made.clear()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert machine_module._link_speed() > 0


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """What NVML says is used, answer by answer, while torch makes a context on a GPU that is host
    memory.
    """
    answers: list[int | None] = []
    real = torch.ones
    machine_module.context_bytes.cache_clear()
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2")
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: False, raising=False)
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: real(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine_module, "used_bytes", lambda uuid: answers.pop(0))
    yield answers
    machine_module.context_bytes.cache_clear()


def test_the_context_is_what_this_process_adds(nvml: list[int | None]) -> None:
    nvml += [5 << 30, (5 << 30) + 450 * MIB]
    assert machine_module.context_bytes("cuda") == 450 * MIB
    assert machine_module.context_bytes("cuda") == 450 * MIB, (
        "asked once per process: later its own context counts as before"
    )


@pytest.mark.parametrize(
    "used", [(None, None), (1, None), (MIB, MIB), (2 * MIB, MIB), (0, 8 << 30)]
)
def test_a_context_that_cannot_be_told_is_none(
    nvml: list[int | None], used: tuple[int | None, int | None]
) -> None:
    """No NVML; nothing added; another program that came or went meanwhile."""
    nvml += used
    assert machine_module.context_bytes("cuda:0") is None


def test_a_context_that_is_there_already_is_not_measured(
    nvml: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index == 1)
    assert machine_module.context_bytes("cuda:1") is None
    monkeypatch.delattr(torch._C, "_cuda_hasPrimaryContext")
    assert machine_module.context_bytes("cuda:0") is None, "where torch cannot say, it may be there"
