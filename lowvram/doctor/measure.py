"""Measure the speeds of this machine with lowvram's own kernels, or load the cached profile.

Torch is imported inside functions only.
"""

from __future__ import annotations

import logging
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowvram.errors import LowvramError
from lowvram.hardware import nvml
from lowvram.hardware.cgroups import host_memory
from lowvram.hardware.machine import find_gpu
from lowvram.hardware.profile import (
    MEASURED,
    PINNED_SHARE,
    TABLE,
    MachineProfile,
    ProfileKey,
    any_profile,
    load_profile,
    save_profile,
)
from lowvram.timing.cards import DISK_BYTES_S
from lowvram.units import format_bytes

logger = logging.getLogger(__name__)

HEAD_DIM = 128
REPEATS, WARM_UP = 5, 2
HOST_COPY_BYTES = 64 << 20
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class ProbeShape:
    """Sizes of the measured operations.

    rows, dim: of linears and norms; keys: of attention; channels, frames, pixels: of a 3-D
    convolution over frames x pixels x pixels.
    """

    rows: int
    dim: int
    keys: int
    channels: int
    frames: int
    pixels: int


# For a GPU the shapes of an A14B block. For a CPU shapes that take a few seconds in total; smaller
# ones would measure the overhead of calls.
SHAPES = {
    "cuda": ProbeShape(8192, 5120, 32768, 96, 4, 256),
    "cpu": ProbeShape(256, 2048, 1024, 96, 4, 64),
}


def machine_key(device: str) -> ProfileKey:
    """Key of this machine's cached profile; device: `cuda` or `cpu`."""
    import torch

    if device == "cuda":
        return ProfileKey(
            torch.cuda.get_device_name(), driver_version(), torch.__version__, _lowvram()
        )
    return ProfileKey(
        f"cpu {platform.machine()} {platform.processor()}",
        platform.release(),
        torch.__version__,
        _lowvram(),
    )


def this_machine(device: str) -> MachineProfile | None:
    """The cached profile of this machine for a device type, `cuda` or `cpu`.

    None if `lowvram doctor` has not measured it, or there is no GPU.
    """
    if not any_profile():
        return None
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return None
    return load_profile(machine_key(device))


def on_disk_of(folder: Path, profile: MachineProfile) -> MachineProfile:
    """The profile for a model in `folder`.

    If the disk's speed was measured on another disk, it is replaced by the table's value, with a
    warning.
    """
    if profile.sources.get("disk_bytes_s") != MEASURED or _same_disk(
        Path(profile.disk_folder), folder
    ):
        return profile
    logger.warning(
        "%s is not on the measured disk (that of %s): its read speed is assumed as %s/s; "
        "run `lowvram doctor --path %s` to measure it",
        *(folder, profile.disk_folder, format_bytes(DISK_BYTES_S), folder),
    )
    return replace(
        profile,
        disk_bytes_s=DISK_BYTES_S,
        disk_folder="",
        sources={**profile.sources, "disk_bytes_s": TABLE},
    )


def machine_profile(
    folder: Path,
    *,
    refresh: bool = False,
    link_bytes_s: float | None = None,
    disk_bytes_s: float | None = None,
) -> tuple[MachineProfile, bool]:
    """Load the cached profile, or measure and cache it; returns it and whether it was measured now.

    A cached profile is used only if `folder` is on its disk, and not with `refresh`.
    link_bytes_s: speed of the link; None measures it.
    disk_bytes_s: read speed of the disk of `folder`; None takes the table's value.
    Raises `LowvramError` when the measurement fails.
    """
    device = "cuda" if find_gpu()[0] is not None else "cpu"
    key = machine_key(device)
    cached = None if refresh else load_profile(key)
    if cached is not None and _same_disk(Path(cached.disk_folder), folder):
        return cached, False
    try:
        profile = measure_profile(device, folder, link_bytes_s, disk_bytes_s)
    except Exception as error:  # out of memory, or a kernel does not compile
        reason = " ".join(str(error).split())[:300]
        raise LowvramError(f"cannot measure the speeds of {key.gpu}: {reason}") from error
    save_profile(profile, key)
    return profile, True


def measure_profile(
    device: str, folder: Path, link_bytes_s: float | None = None, disk_bytes_s: float | None = None
) -> MachineProfile:
    """Measure the rates of a device, `cuda` or `cpu`, and host copies.

    link_bytes_s: speed of the link; None measures it. disk_bytes_s: read speed of the disk of
    `folder`; None takes the table's value. Raises `LowvramError` without a GPU, and torch's errors.
    """
    gpu, missing = find_gpu(measure=link_bytes_s is None) if device == "cuda" else (None, "")
    if missing:
        raise LowvramError(missing)
    memory = host_memory()
    host_copy = _host_copy_speed()
    link = link_bytes_s or (gpu.link_bytes_s if gpu else None)
    rates = _Probe(device, _probe_shape(device)).rates()
    sources = dict.fromkeys(
        (
            *rates,
            "link_bytes_s",
            "host_copy_bytes_s",
            "vram_total_bytes",
            "vram_free_bytes",
            "ram_total_bytes",
        ),
        MEASURED,
    )
    sources |= {"disk_bytes_s": MEASURED if disk_bytes_s else TABLE, "pinned_limit_bytes": TABLE}
    if gpu and not link:
        sources["link_bytes_s"] = TABLE
    return MachineProfile(
        name=gpu.name if gpu else f"CPU ({platform.machine()})",
        device=device,
        link_bytes_s=link or host_copy,
        disk_bytes_s=disk_bytes_s or DISK_BYTES_S,
        host_copy_bytes_s=host_copy,
        vram_total_bytes=gpu.total_bytes if gpu else memory.total_bytes,
        vram_free_bytes=gpu.free_bytes if gpu else memory.free_bytes,
        ram_total_bytes=memory.total_bytes,
        pinned_limit_bytes=int(memory.total_bytes * PINNED_SHARE),
        disk_folder=str(folder.absolute()),
        sources=sources,
        **rates,
    )


def _probe_shape(device: str) -> ProbeShape:
    """Shapes for a device; those of a CPU if a GPU runs references, which would take minutes."""
    if device == "cuda":
        import torch
        from lowvram_kernels.constraints import refused_gpu
        from lowvram_kernels.dispatch import distrusted

        if refused_gpu(torch.device("cuda")) is not None or distrusted():
            return SHAPES["cpu"]
    return SHAPES[device]


class _Probe:
    """Measures the computing rates of one device, with the dispatch that a run uses."""

    def __init__(self, device: str, shape: ProbeShape) -> None:
        self._device, self._shape = device, shape

    def rates(self) -> dict[str, Any]:
        """All rates, by field of `MachineProfile`."""
        import torch

        shape = self._shape
        heads = shape.dim // HEAD_DIM
        products = 2.0 * shape.rows * shape.dim * shape.dim
        attention = 4.0 * shape.rows * shape.keys * shape.dim
        convolved = 2.0 * shape.channels**2 * 27 * shape.frames * shape.pixels**2
        return {
            "gemm_int8_ops_s": products / self._seconds(self._linear(torch.int8)),
            "gemm_fp8_ops_s": products / self._seconds(self._linear(torch.float8_e4m3fn)),
            "gemm_bf16_ops_s": products / self._seconds(self._plain_linear(torch.bfloat16)),
            "gemm_fp32_ops_s": products / self._seconds(self._plain_linear(torch.float32)),
            "attention_ops_s": attention / self._seconds(self._attention(heads)),
            "attention_bf16_ops_s": attention
            / self._seconds(self._plain_attention(heads, torch.bfloat16)),
            "attention_fp32_ops_s": attention
            / self._seconds(self._plain_attention(heads, torch.float32)),
            "conv_ops_s": convolved / self._seconds(self._convolution()),
            "elementwise_bytes_s": 5.0
            * shape.rows
            * shape.dim
            / self._seconds(self._norm(shape.rows, shape.dim)),
            "launch_s": self._launch_seconds(),
        }

    def _seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of a call, after warm-up calls."""
        import torch

        for _ in range(WARM_UP):
            run()
        times = []
        for _ in range(REPEATS):
            self._wait()
            began = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - began)
        if self._device == "cuda":
            torch.cuda.empty_cache()
        return max(statistics.median(times), 1e-9)

    def _wait(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _launch_seconds(self, count: int = 50) -> float:
        """Seconds to launch one small kernel, or to run the op on a CPU."""
        run = self._norm(64, 256)
        for _ in range(WARM_UP):
            run()
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            run()
        seconds = (time.perf_counter() - began) / count
        self._wait()
        return max(seconds, 1e-9)

    def _codes(self, *shape: int, dtype: Any = None) -> Any:
        import torch

        codes = torch.randint(-127, 128, shape, device=self._device, dtype=torch.int8)
        return codes if dtype in (None, torch.int8) else codes.to(torch.bfloat16).to(dtype)

    def _scales(self, *shape: int) -> Any:
        import torch

        return torch.rand(*shape, device=self._device) * 0.01 + 0.001

    def _linear(self, dtype: Any) -> Callable[[], object]:
        import lowvram_kernels.ops as ops
        import torch

        rows, dim = self._shape.rows, self._shape.dim
        x, weight = self._codes(rows, dim, dtype=dtype), self._codes(dim, dim, dtype=dtype)
        bias, out = (
            self._scales(dim),
            torch.empty(rows, dim, device=self._device, dtype=torch.bfloat16),
        )
        x_scale, scale = self._scales(rows, 1), self._scales(dim, 1)
        return lambda: ops.quantized_linear(x, x_scale, weight, scale, bias, out)

    def _plain_linear(self, dtype: Any) -> Callable[[], object]:
        import torch

        rows, dim = self._shape.rows, self._shape.dim
        x, weight = (
            torch.randn(count, dim, device=self._device, dtype=dtype) for count in (rows, dim)
        )
        return lambda: torch.nn.functional.linear(x, weight)

    def _attention(self, heads: int) -> Callable[[], object]:
        import lowvram_kernels.ops as ops
        import torch
        from lowvram_kernels.sizes import STORED_VALUES
        from lowvram_kernels.tuning import pv_dtype, values_of

        rows, keys = self._shape.rows, math.ceil(self._shape.keys / 64) * 64
        q, k = self._codes(heads, rows, HEAD_DIM), self._codes(heads, keys, HEAD_DIM)
        q_scale, k_scale = self._scales(heads, rows), self._scales(heads, keys)
        dtype = pv_dtype(torch.device(self._device))
        v = torch.randn(keys, heads * HEAD_DIM, device=self._device, dtype=torch.bfloat16)
        v_scale = None
        if STORED_VALUES[values_of(dtype)].scaled:
            stored = torch.empty(heads, HEAD_DIM, keys, device=self._device, dtype=dtype)
            v_scale = self._scales(heads, keys // 64, HEAD_DIM, 2)
            ops.quantize_values(v, stored, v_scale)
            v = stored
        out = torch.empty(rows, heads * HEAD_DIM, device=self._device, dtype=torch.bfloat16)
        return lambda: ops.attention_int8(q, q_scale, k, k_scale, v, v_scale, out)

    def _plain_attention(self, heads: int, dtype: Any) -> Callable[[], object]:
        import torch

        rows, keys = self._shape.rows, self._shape.keys
        q, k, v = (
            torch.randn(1, heads, count, HEAD_DIM, device=self._device, dtype=dtype)
            for count in (rows, keys, keys)
        )
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def _convolution(self) -> Callable[[], object]:
        import torch

        shape = self._shape
        clip = torch.randn(
            1, shape.channels, shape.frames, shape.pixels, shape.pixels, device=self._device
        )
        weight = torch.randn(shape.channels, shape.channels, 3, 3, 3, device=self._device)
        return lambda: torch.nn.functional.conv3d(clip, weight, padding=1)

    def _norm(self, rows: int, dim: int) -> Callable[[], object]:
        import lowvram_kernels.ops as ops
        import torch

        x, scale, shift = (
            torch.randn(*size, device=self._device) for size in ((rows, dim), (dim,), (dim,))
        )
        out, row_scale = (
            torch.empty(rows, dim, device=self._device, dtype=torch.int8),
            torch.empty(rows, 1, device=self._device),
        )
        return lambda: ops.adaln_quantize(x, scale, shift, out, row_scale, eps=1e-6, rotated=True)


def _host_copy_speed() -> float:
    """Speed in bytes/s of a copy within host memory."""
    import torch

    source = torch.zeros(HOST_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return HOST_COPY_BYTES / max(best, 1e-9)


def _same_disk(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False


def driver_version() -> str:
    """Version of the GPU driver; if unknown, the ROCm or CUDA version that torch was built for."""
    import torch

    try:
        return NVIDIA_DRIVER.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        built_for = (
            f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        )
        return nvml.driver_version() or built_for


def _lowvram() -> str:
    try:
        return version("lowvram")
    except PackageNotFoundError:
        return "source"
