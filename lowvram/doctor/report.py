"""The report of `lowvram doctor`: resources of the machine, problems, and how to fix them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowvram.doctor.kernel_check import KernelReport, trust_kernels
from lowvram.doctor.measure import machine_profile
from lowvram.errors import LowvramError, UsageError
from lowvram.hardware.machine import Machine
from lowvram.hardware.profile import MachineProfile
from lowvram.units import format_bytes, format_memory

MIN_VRAM_BYTES = 5 << 30  # for the A14B models at 480p
MIN_RAM_BYTES = 6 << 30
STORE_BYTES = 36 * 10**9  # a quantized A14B model: two experts, text encoder, VAE
SLOW_DISK_BYTES_S = 1e9
# Ampere, the oldest architecture with int8 tensor cores that the kernels support.
INT8_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    status: `ok`, `warn` (works, but slower or with limits) or `missing`; advice: what to do, or
    empty.
    """

    name: str
    status: str
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class MeasuredProfile:
    """The machine's profile, and whether it was measured now; or why there is none."""

    profile: MachineProfile | None
    measured_now: bool = False
    reason: str = ""


def measured_speeds(path: Path, machine: Machine, refresh: bool = False) -> MeasuredProfile:
    """Measure the speeds of this machine and the disk of `path`, or return the cached profile.

    refresh: ignore the cache.
    """
    link = machine.gpu.link_bytes_s if machine.gpu else None
    try:
        profile, fresh = machine_profile(
            path, refresh=refresh, link_bytes_s=link, disk_bytes_s=machine.disk_read_bytes_s
        )
    except (LowvramError, ImportError) as error:
        return MeasuredProfile(None, reason=str(error))
    return MeasuredProfile(profile, fresh)


def check_folder(path: Path) -> None:
    """Raise `UsageError` unless `path` is an accessible folder; to be called before measuring."""
    if not os.path.isdir(path):  # also False for a folder without access
        raise UsageError(f"{path} is not an accessible folder: give --path a folder that exists")


def checked_kernels(machine: Machine, refresh: bool = False) -> KernelReport | None:
    """Check the kernels of this GPU with `trust_kernels`; None if no kernel can run."""
    if machine.gpu is None or not machine.triton_works or machine.gpu.capability < INT8_CAPABILITY:
        return None
    import torch

    return trust_kernels(torch.device("cuda"), refresh)


def doctor_report(
    path: Path,
    machine: Machine,
    speeds: MeasuredProfile | None = None,
    kernels: KernelReport | None = None,
) -> dict[str, Any]:
    """The report as data for JSON; disk space and speed are those of `path`.

    ok: nothing is missing; findings: a list of `Finding`; machine: `Machine`; profile:
    `MachineProfile` or None; kernels: a list of `Check`.
    """
    findings = [
        _gpu(machine),
        _triton(machine),
        _kernels(machine, kernels),
        _ram(machine),
        _disk_room(machine, path),
        _disk_speed(machine),
    ]
    findings += [_speeds(speeds)] if speeds else []
    findings += [_packages(machine), _encoder()]
    ok = all(finding.status != "missing" for finding in findings)
    profile = speeds.profile.to_dict() if speeds and speeds.profile else None
    return {
        "ok": ok,
        "findings": [asdict(finding) for finding in findings],
        "machine": machine.to_dict(),
        "profile": profile,
        "kernels": [asdict(check) for check in kernels.checks] if kernels else [],
    }


def _speeds(speeds: MeasuredProfile) -> Finding:
    profile = speeds.profile
    if profile is None:
        return Finding(
            "speeds",
            "warn",
            speeds.reason,
            "plans have no predicted times: close other programs that use the GPU and try again",
        )
    rates = (
        f"int8 GEMM {profile.gemm_int8_ops_s / 1e12:.3g} TOPS, attention "
        f"{profile.attention_ops_s / 1e12:.3g} TOPS"
    )
    moved = (
        f"element-wise {format_bytes(profile.elementwise_bytes_s)}/s, link "
        f"{format_bytes(profile.link_bytes_s)}/s"
    )
    when = "measured now" if speeds.measured_now else "measured before"
    advice = "" if speeds.measured_now else "measure again with --refresh"
    return Finding(
        "speeds",
        "ok",
        f"{rates}, {moved}, disk {format_bytes(profile.disk_bytes_s)}/s; {when}",
        advice,
    )


def _gpu(machine: Machine) -> Finding:
    gpu = machine.gpu
    if gpu is None:
        built_without = "without GPU" in machine.gpu_reason
        advice = (
            "install torch for your GPU (pytorch.org, Get started)"
            if built_without
            else "install the GPU's driver and restart"
        )
        return Finding(
            "GPU", "warn", machine.gpu_reason, f"for anything larger than the demo, {advice}"
        )
    link = f", link {format_bytes(gpu.link_bytes_s)}/s" if gpu.link_bytes_s else ""
    detail = (
        f"{gpu.name} ({gpu.architecture}), {format_memory(gpu.free_bytes)} of "
        f"{format_memory(gpu.total_bytes)} free{link}"
    )
    if gpu.capability < INT8_CAPABILITY and gpu.architecture.startswith("sm_"):
        return Finding(
            "GPU",
            "warn",
            detail,
            "the int8 kernels need an RTX 30 or later: the slow references are used",
        )
    if gpu.free_bytes < MIN_VRAM_BYTES:
        return Finding(
            "GPU",
            "warn",
            detail,
            f"close other programs that use the GPU: the A14B models need "
            f"{format_memory(MIN_VRAM_BYTES)}",
        )
    return Finding("GPU", "ok", detail)


def _triton(machine: Machine) -> Finding:
    if machine.triton_works:
        return Finding(
            "Triton", "ok", f"version {machine.versions.get('triton')}", machine.triton_note
        )
    if machine.gpu is None:
        return Finding("Triton", "ok", f"not needed without a GPU ({machine.triton_reason})")
    package = "triton-windows" if sys.platform == "win32" else "triton"
    advice = (
        f"install the version of {package} that your torch requires, and a C compiler; until "
        f"then the slow references are used"
    )
    return Finding("Triton", "warn", machine.triton_reason, advice)


def _kernels(machine: Machine, report: KernelReport | None) -> Finding:
    if report is None:
        reason = "without a GPU" if machine.gpu is None else "because no kernel can run"
        return Finding("kernels", "ok", f"not needed {reason}")
    detail = f"{report.summary}; {'checked now' if report.checked_now else 'checked before'}"
    if report.problems:
        subject = "it runs" if len(report.problems) == 1 else "they run"
        advice = (
            f"install the GPU's newest driver and the Triton version that your torch requires, "
            f"then --refresh; until then {subject} as torch code"
        )
        return Finding("kernels", "warn", detail, f"{advice}, slower")
    if report.unchecked:
        return Finding(
            "kernels", "warn", detail, "close other programs that use the GPU and try again"
        )
    return Finding(
        "kernels", "ok", detail, "" if report.checked_now else "check again with --refresh"
    )


def _ram(machine: Machine) -> Finding:
    limit = "" if machine.ram_limited_by == "machine" else f" (limit of {machine.ram_limited_by})"
    detail = (
        f"{format_memory(machine.ram_free_bytes)} of "
        f"{format_memory(machine.ram_total_bytes)} free{limit}"
    )
    if machine.ram_free_bytes < MIN_RAM_BYTES:
        return Finding(
            "RAM",
            "warn",
            detail,
            f"close other programs: the A14B models need {format_memory(MIN_RAM_BYTES)}",
        )
    return Finding("RAM", "ok", detail)


def _disk_room(machine: Machine, path: Path) -> Finding:
    if machine.disk_free_bytes is None:
        return Finding("disk room", "warn", f"unknown for {path}", "give a folder that exists")
    detail = f"{format_bytes(machine.disk_free_bytes)} free at {path}"
    if machine.disk_free_bytes < STORE_BYTES:
        return Finding(
            "disk room",
            "warn",
            detail,
            f"a quantized A14B model takes {format_bytes(STORE_BYTES)}: free some space",
        )
    return Finding("disk room", "ok", detail)


def _disk_speed(machine: Machine) -> Finding:
    speed = machine.disk_read_bytes_s
    if speed is None:
        return Finding("disk speed", "ok", "not measured")
    if speed < SLOW_DISK_BYTES_S:
        return Finding(
            "disk speed",
            "warn",
            f"{format_bytes(speed)}/s",
            "weights that do not fit into RAM are read from it: use an NVMe disk",
        )
    return Finding("disk speed", "ok", f"{format_bytes(speed)}/s")


def _packages(machine: Machine) -> Finding:
    absent = [
        name
        for name, version in machine.versions.items()
        if version is None and name not in ("triton", "lowvram")
    ]
    if absent:
        return Finding(
            "packages",
            "missing",
            f"not installed: {', '.join(absent)}",
            "install lowvram again, or run scripts/bootstrap.py",
        )
    listed = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if version)
    return Finding("packages", "ok", f"Python {machine.python}, {listed}")


def _encoder() -> Finding:
    try:
        import av
    except (ImportError, OSError) as error:
        return Finding("video", "missing", f"PyAV does not load: {error}", "install the package av")
    if "libx264" not in av.codecs_available:
        return Finding(
            "video",
            "missing",
            "PyAV was built without libx264",
            "install av from PyPI, whose wheels include it",
        )
    return Finding("video", "ok", f"PyAV {av.__version__} with libx264")
