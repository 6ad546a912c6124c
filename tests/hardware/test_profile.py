"""The machine's profile: measured, kept, and never trusted where it is damaged or another
machine's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowvram.cli.app import app
from lowvram.doctor import measure
from lowvram.doctor import read_speed as read_speed_module
from lowvram.doctor.measure import (
    ProbeShape,
    machine_key,
    machine_profile,
    measure_profile,
    on_disk_of,
    this_machine,
)
from lowvram.doctor.report import doctor_report, measured_speeds
from lowvram.errors import LowvramError, UsageError
from lowvram.hardware.machine import probe_machine
from lowvram.hardware.profile import (
    CACHE_VERSION,
    MachineProfile,
    ProfileKey,
    load_profile,
    save_profile,
)
from lowvram.pipeline import load
from lowvram.timing.cards import DISK_BYTES_S, find_card
from tests.helpers.checkpoints import tiny_config, write_store

KEY = ProfileKey("NVIDIA GeForce RTX 3060", "570.86.10", "2.13.0", "0.1.0")
PROFILE = find_card("RTX 3060").profile()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that take milliseconds."""
    monkeypatch.setattr(
        measure, "SHAPES", dict.fromkeys(measure.SHAPES, ProbeShape(64, 256, 64, 4, 2, 8))
    )
    monkeypatch.setattr(measure, "HOST_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(read_speed_module, "PROBE_BLOCK_BYTES", 1 << 20)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    path = save_profile(PROFILE, KEY, tmp_path / "made" / "here")
    assert path is not None
    assert load_profile(KEY, path.parent) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == [KEY.file_name]


@pytest.mark.parametrize(
    "changes", [{"gpu": "other"}, {"driver": "580"}, {"torch": "2.14"}, {"lowvram": "0.2"}]
)
def test_another_machine_or_version_has_no_profile(tmp_path: Path, changes: dict[str, str]) -> None:
    save_profile(PROFILE, KEY, tmp_path)
    other = dataclasses.replace(KEY, **changes)
    assert load_profile(other, tmp_path) is None
    # a copied or renamed file is not believed either
    (tmp_path / KEY.file_name).rename(tmp_path / other.file_name)
    assert load_profile(other, tmp_path) is None


def kept(folder: Path) -> dict[str, object]:
    path = save_profile(PROFILE, KEY, folder)
    assert path is not None
    data: dict[str, object] = json.loads(path.read_text())
    return data


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000),
        *(
            f'{{"version": {CACHE_VERSION}{rest}}}'.encode()
            for rest in ("", ', "key": {}, "profile": {}')
        ),
    ],
)
def test_a_damaged_cache_is_no_profile(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY.file_name).write_bytes(content)
    assert load_profile(KEY, tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"link_bytes_s": -1.0},
        {"disk_bytes_s": 0},
        {"gemm_int8_ops_s": "fast"},
        {"attention_ops_s": float("nan")},
        {"conv_ops_s": float("inf")},
        {"ram_total_bytes": -5},
        {"vram_total_bytes": True},
        {"name": 7},
        {"sources": 3},
        {"unknown": 1},
        {"link_bytes_s": None},
    ],
)
def test_impossible_numbers_are_no_profile(tmp_path: Path, change: dict[str, object]) -> None:
    data = kept(tmp_path)
    assert isinstance(data["profile"], dict)
    data["profile"].update(change)
    (tmp_path / KEY.file_name).write_text(json.dumps(data))
    assert load_profile(KEY, tmp_path) is None


def test_a_missing_field_is_no_profile(tmp_path: Path) -> None:
    data = kept(tmp_path)
    assert isinstance(data["profile"], dict)
    del data["profile"]["link_bytes_s"]
    (tmp_path / KEY.file_name).write_text(json.dumps(data))
    assert load_profile(KEY, tmp_path) is None


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert save_profile(PROFILE, KEY, tmp_path / "file") is None


def test_a_profile_refuses_what_no_machine_has() -> None:
    with pytest.raises(UsageError, match="link_bytes_s"):
        dataclasses.replace(PROFILE, link_bytes_s=math.inf)


@pytest.mark.usefixtures("tiny")
def test_every_speed_of_this_machine_is_measured(tmp_path: Path) -> None:
    profile = measure_profile("cpu", tmp_path)
    assert profile.device == "cpu"
    rates = [name for name in profile.to_dict() if name.endswith("_s")]
    assert all(profile.sources[name] == "measured" for name in rates if name != "disk_bytes_s")
    assert (profile.disk_bytes_s, profile.sources["disk_bytes_s"]) == (DISK_BYTES_S, "table"), (
        "nobody has measured the disk"
    )
    known = measure_profile("cpu", tmp_path, disk_bytes_s=2e9)
    assert (known.disk_bytes_s, known.sources["disk_bytes_s"], known.disk_folder) == (
        2e9,
        "measured",
        str(tmp_path),
    )
    assert all(getattr(profile, name) > 0 for name in rates)
    assert list(tmp_path.iterdir()) == []
    assert MachineProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lowvram"


@pytest.mark.usefixtures("tiny")
def test_the_doctor_measures_once(tmp_path: Path, own_cache: Path) -> None:
    assert this_machine("cpu") is None
    first, measured = machine_profile(tmp_path)
    assert measured
    assert stat.S_ISREG((own_cache / machine_key("cpu").file_name).stat().st_mode)
    assert this_machine("cpu") == first
    assert machine_profile(tmp_path) == (first, False)
    again, measured = machine_profile(tmp_path, refresh=True, disk_bytes_s=123e6)
    assert measured
    assert again.disk_bytes_s == 123e6
    assert this_machine("cpu") == again


@pytest.mark.usefixtures("tiny")
def test_a_damaged_profile_is_measured_anew(tmp_path: Path, own_cache: Path) -> None:
    machine_profile(tmp_path)
    (own_cache / machine_key("cpu").file_name).write_text("garbage")
    profile, measured = machine_profile(tmp_path)
    assert measured
    assert this_machine("cpu") == profile


@pytest.mark.usefixtures("tiny", "own_cache")
def test_another_disk_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_profile(tmp_path)
    monkeypatch.setattr(measure, "_same_disk", lambda one, other: False)
    assert machine_profile(tmp_path)[1]


@pytest.mark.usefixtures("own_cache")
def test_a_kernel_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error:\nout of memory")

    monkeypatch.setattr(measure, "measure_profile", fails)
    with pytest.raises(LowvramError, match="CUDA error: out of memory"):
        machine_profile(tmp_path)
    machine = probe_machine(tmp_path)
    report = doctor_report(tmp_path, machine, measured_speeds(tmp_path, machine))
    found = next(finding for finding in report["findings"] if finding["name"] == "speeds")
    assert found["status"] == "warn"
    assert "out of memory" in found["detail"]
    assert report["profile"] is None


@pytest.mark.usefixtures("tiny", "own_cache")
def test_the_doctor_shows_speeds_and_says_whether_they_are_new(tmp_path: Path) -> None:
    machine = probe_machine(tmp_path)
    for word in ("measured now", "measured before"):
        report = doctor_report(tmp_path, machine, measured_speeds(tmp_path, machine))
        found = next(finding for finding in report["findings"] if finding["name"] == "speeds")
        assert found["status"] == "ok"
        assert word in found["detail"]
    assert report["profile"]["gemm_int8_ops_s"] > 0
    json.dumps(report)


@pytest.mark.usefixtures("tiny", "own_cache")
def test_the_doctor_measures_the_disk_with_the_streamers_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def read_speed(folder: Path) -> float:
        asked.append(folder)
        return 123e6

    monkeypatch.setattr(read_speed_module, "read_speed", read_speed)
    report = json.loads(
        CliRunner().invoke(app, ["doctor", "--path", str(tmp_path), "--json"]).stdout
    )
    assert asked == [tmp_path]
    assert report["machine"]["disk_read_bytes_s"] == report["profile"]["disk_bytes_s"] == 123e6
    assert report["profile"]["sources"]["disk_bytes_s"] == "measured"


# Of another st_dev than any disk; where the system has none, a folder that is gone, which is no
# disk that was measured either.
OTHER_DISK = Path("/proc")
MEASURED_HERE = {"disk_bytes_s": "measured", "gemm_int8_ops_s": "measured"}


def test_a_measured_disk_is_that_of_its_own_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = dataclasses.replace(
        PROFILE, disk_bytes_s=7e9, disk_folder=str(tmp_path), sources=MEASURED_HERE
    )
    (tmp_path / "model").mkdir()
    with caplog.at_level(logging.WARNING):
        assert on_disk_of(tmp_path / "model", here) is here
        unmeasured = dataclasses.replace(
            here, disk_folder=str(OTHER_DISK), sources=MEASURED_HERE | {"disk_bytes_s": "table"}
        )
        assert on_disk_of(tmp_path, unmeasured) is unmeasured
        assert not caplog.records
        for folder in (OTHER_DISK, tmp_path / "gone"):
            there = dataclasses.replace(here, disk_folder=str(folder))
            moved = on_disk_of(tmp_path, there)
            assert (moved.disk_bytes_s, moved.sources) == (
                DISK_BYTES_S,
                MEASURED_HERE | {"disk_bytes_s": "table"},
            )
            assert (
                dataclasses.replace(
                    moved, disk_bytes_s=7e9, disk_folder=str(folder), sources=MEASURED_HERE
                )
                == there
            )
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all(f"lowvram doctor --path {tmp_path}" in line and "\n" not in line for line in told)


@pytest.mark.parametrize("folder", ["", str(OTHER_DISK)])
def test_a_run_uses_the_measured_disk_only_for_a_model_on_it(
    folder: str, tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_store(tmp_path / "model", tiny_config())
    measured = dataclasses.replace(
        PROFILE,
        device="cpu",
        disk_bytes_s=7e9,
        disk_folder=folder or str(tmp_path),
        sources=MEASURED_HERE,
    )
    save_profile(measured, machine_key("cpu"))
    assert own_cache.exists()
    with caplog.at_level(logging.WARNING):
        pipeline = load(model, "1GiB", "4GiB", "cpu", prompt_cache=False)
    pipeline.store.close()
    assert pipeline.profile is not None
    assert (pipeline.profile.disk_bytes_s, pipeline.profile.sources["disk_bytes_s"]) == (
        (3.5e9, "table") if folder else (7e9, "measured")
    )
    assert pipeline.profile.gemm_int8_ops_s == measured.gemm_int8_ops_s
    assert len(
        [record for record in caplog.records if "lowvram doctor --path" in record.getMessage()]
    ) == bool(folder)


def test_a_gpu_that_does_not_answer_is_not_measured_as_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        measure,
        "find_gpu",
        lambda measure: (None, "the GPU does not respond: CUDA error: unknown error"),
    )
    with pytest.raises(LowvramError, match="the GPU does not respond: CUDA error: unknown error"):
        measure.measure_profile("cuda", tmp_path)


@pytest.mark.parametrize(
    ("reason", "device"), [(None, "cuda"), ("compute capability 7.5 has no tensor cores", "cpu")]
)
def test_a_gpu_that_only_references_serve_is_probed_with_small_shapes(
    reason: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram_kernels.constraints.refused_gpu", lambda device: reason)
    assert measure._probe_shape("cuda") == measure.SHAPES[device]


def test_whatever_a_kernel_raises_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's own errors are plain exceptions."""

    def fails(*arguments: object) -> None:
        raise type("PTXASError", (Exception,), {})("`ptxas` failed")

    monkeypatch.setattr(measure, "measure_profile", fails)
    with pytest.raises(LowvramError, match=r"cannot measure the speeds of .*: `ptxas` failed"):
        measure.machine_profile(tmp_path, refresh=True)
