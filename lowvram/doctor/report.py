"""What a run may count on here, and the findings of `lowvram doctor`: what is there, what is
missing, and how to get it.
"""

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
from lowvram.units import format_bytes

MIN_VRAM_BYTES = 5 << 30  # of the A14B models, at 480p
MIN_RAM_BYTES = 6 << 30
STORE_BYTES = 36 * 10**9  # a quantized A14B model: two experts, text encoder, VAE
SLOW_DISK_BYTES_S = 1e9
# Ampere: the oldest with the tensor cores that the kernels are written for
INT8_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Finding:
    """status: ok, warn (works, but slower or less) or missing. advice is empty where there is
    nothing to do.
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
    """The cached profile of this machine and the disk of `path`, else (or with `refresh`) measured
    now and cached.
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
    """To be asked before anything is measured: raises `UsageError` where `path` is no folder, so
    that no disk can be looked at.
    """
    if not os.path.isdir(path):  # which is False, too, where a folder above it may not be entered
        raise UsageError(
            f"{path} is not a folder that can be looked at: give --path one that exists"
        )


def checked_kernels(machine: Machine, refresh: bool = False) -> KernelReport | None:
    """The check of the kernels on this GPU, remembered or (with `refresh`) made now, and applied;
    None where no kernel can run.
    """
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
    """{"ok": nothing is missing, "findings": […], "machine": {…}, "profile": {…} or None,
    "kernels": [a check per call]}; disk room and speed are those of `path`.
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
            "plans are then made without predicted times: close what uses the GPU, try again",
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
            else "install the GPU's driver and start again"
        )
        return Finding(
            "GPU", "warn", machine.gpu_reason, f"for anything larger than the demo, {advice}"
        )
    link = f", link {format_bytes(gpu.link_bytes_s)}/s" if gpu.link_bytes_s else ""
    detail = (
        f"{gpu.name} ({gpu.architecture}), {format_bytes(gpu.free_bytes)} of "
        f"{format_bytes(gpu.total_bytes)} free{link}"
    )
    if gpu.capability < INT8_CAPABILITY and gpu.architecture.startswith("sm_"):
        return Finding(
            "GPU",
            "warn",
            detail,
            "the int8 kernels need an RTX 30 or later: here their slow reference runs",
        )
    if gpu.free_bytes < MIN_VRAM_BYTES:
        return Finding(
            "GPU",
            "warn",
            detail,
            f"close what else uses the GPU: the A14B models want {format_bytes(MIN_VRAM_BYTES)}",
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
        f"install {package} in the version that your torch names, and a C compiler; until "
        f"then the slow reference runs"
    )
    return Finding("Triton", "warn", machine.triton_reason, advice)


def _kernels(machine: Machine, report: KernelReport | None) -> Finding:
    if report is None:
        reason = "without a GPU" if machine.gpu is None else "where no kernel runs"
        return Finding("kernels", "ok", f"not needed {reason}")
    detail = f"{report.summary}; {'checked now' if report.checked_now else 'checked before'}"
    if report.problems:
        fallen = "it runs" if len(report.problems) == 1 else "they run"
        advice = (
            f"install the GPU's newest driver and the Triton that your torch names, then "
            f"--refresh; until then {fallen} as torch code"
        )
        return Finding("kernels", "warn", detail, f"{advice}, slower")
    if report.unchecked:
        return Finding(
            "kernels", "warn", detail, "close what else uses the GPU and call this again"
        )
    return Finding(
        "kernels", "ok", detail, "" if report.checked_now else "check again with --refresh"
    )


def _ram(machine: Machine) -> Finding:
    limit = "" if machine.ram_limited_by == "machine" else f" (limit of {machine.ram_limited_by})"
    detail = (
        f"{format_bytes(machine.ram_free_bytes)} of "
        f"{format_bytes(machine.ram_total_bytes)} free{limit}"
    )
    if machine.ram_free_bytes < MIN_RAM_BYTES:
        return Finding(
            "RAM",
            "warn",
            detail,
            f"close other programs: the A14B models want {format_bytes(MIN_RAM_BYTES)}",
        )
    return Finding("RAM", "ok", detail)


def _disk_room(machine: Machine, path: Path) -> Finding:
    if machine.disk_free_bytes is None:
        return Finding(
            "disk room", "warn", f"cannot be told for {path}", "name a folder that exists"
        )
    detail = f"{format_bytes(machine.disk_free_bytes)} free at {path}"
    if machine.disk_free_bytes < STORE_BYTES:
        return Finding(
            "disk room",
            "warn",
            detail,
            f"a quantized A14B model takes {format_bytes(STORE_BYTES)}: make room",
        )
    return Finding("disk room", "ok", detail)


def _disk_speed(machine: Machine) -> Finding:
    speed = machine.disk_read_bytes_s
    if speed is None:
        return Finding("disk speed", "ok", "not measured here")
    if speed < SLOW_DISK_BYTES_S:
        return Finding(
            "disk speed",
            "warn",
            f"{format_bytes(speed)}/s",
            "weights beyond RAM come from it: an NVMe disk keeps up",
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
            "PyAV comes without libx264",
            "install av from PyPI, whose wheels have it",
        )
    return Finding("video", "ok", f"PyAV {av.__version__} with libx264")
