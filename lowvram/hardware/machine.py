"""Query the machine: GPU, driver, host memory, disk, library versions, link speed.

Torch and Triton are imported inside functions only.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowvram.hardware.cgroups import cpu_count, host_memory
from lowvram.hardware.nvml import used_bytes

logger = logging.getLogger(__name__)
LINK_PROBE_BYTES = 256 << 20
MOST_CONTEXT_BYTES = 3 << 30  # what grows by more than this is another program
PACKAGES = (
    "lowvram",
    "torch",
    "triton",
    "diffusers",
    "safetensors",
    "tokenizers",
    "optimum-quanto",
    "av",
)


@dataclass(frozen=True)
class Gpu:
    """One CUDA or ROCm device.

    capability: compute capability (major, minor); architecture: `sm_90`, or the gfx name.
    link_bytes_s: speed of copies from pinned host memory in bytes/s, None if not measured.
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    architecture: str
    link_bytes_s: float | None = None


@dataclass(frozen=True)
class Machine:
    """The resources of one machine.

    gpu_reason, triton_reason: why there is no GPU or why Triton does not work, empty otherwise.
    triton_note: a warning about the Triton version, or empty.
    disk_read_bytes_s: read speed of the disk in bytes/s, None if not measured.
    """

    system: str
    python: str
    cpu_count: int
    ram_total_bytes: int
    ram_free_bytes: int
    ram_limited_by: str
    gpu: Gpu | None
    gpu_reason: str
    disk_free_bytes: int | None
    disk_read_bytes_s: float | None
    triton_works: bool
    triton_reason: str
    versions: dict[str, str | None]
    triton_note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields as data for JSON."""
        return asdict(self)


def probe_machine(
    folder: Path | None = None,
    *,
    measure: bool = False,
    disk_speed: Callable[[Path], float | None] | None = None,
) -> Machine:
    """Query the machine, and the disk of `folder` if given.

    measure: also measure the link to the GPU and, with `disk_speed`, the disk (about a second).
    disk_speed: returns the read speed of a folder's disk in bytes/s, None if unknown; see
    `doctor.read_speed`.
    """
    memory = host_memory()
    gpu, gpu_reason = find_gpu(measure)
    triton_reason = why_triton_fails(gpu is not None)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu_count=cpu_count(),
        ram_total_bytes=memory.total_bytes,
        ram_free_bytes=memory.free_bytes,
        ram_limited_by=memory.limited_by,
        gpu=gpu,
        gpu_reason=gpu_reason,
        disk_free_bytes=disk_free(folder) if folder else None,
        disk_read_bytes_s=disk_speed(folder) if folder and measure and disk_speed else None,
        triton_works=not triton_reason,
        triton_reason=triton_reason,
        versions={name: _version(name) for name in PACKAGES},
        triton_note=triton_note(),
    )


def find_gpu(measure: bool = False) -> tuple[Gpu | None, str]:
    """The current GPU and an empty text, or None and the reason."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, f"torch does not load: {_one_line(error)}"
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        reason = (
            "torch finds no GPU: is its driver installed?"
            if built_for
            else f"torch {torch.__version__} is built without GPU support"
        )
        return None, reason
    try:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:  # a broken driver, or no memory left on the device
        return None, f"the GPU does not respond: {_one_line(error)}"
    capability = (int(properties.major), int(properties.minor))
    architecture = (
        str(getattr(properties, "gcnArchName", "")).split(":")[0]
        if torch.version.hip
        else f"sm_{capability[0]}{capability[1]}"
    )
    link = _link_speed_if_it_can_be_measured() if measure else None
    return Gpu(str(properties.name), int(total), int(free), capability, architecture, link), ""


def why_triton_fails(has_gpu: bool) -> str:
    """Reason why Triton does not work, or an empty text.

    Triton needs a working GPU and, at its first use, a C compiler.
    """
    try:
        import triton
    except (ImportError, OSError) as error:
        return f"Triton does not load: {_one_line(error)}"
    if not has_gpu:
        return "there is no GPU"
    from lowvram_kernels.constraints import old_triton

    too_old = old_triton()
    if too_old:
        return too_old
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # driver and compiler raise errors of any class
        return f"Triton's driver fails: {_one_line(error)}"
    return ""


def triton_note() -> str:
    """Warning about a Triton version that the kernels were not compiled with, or an empty text."""
    from lowvram_kernels.constraints import untried_triton

    note = untried_triton()
    return f"{note}: the kernel check says whether their results are correct" if note else ""


def disk_free(folder: Path) -> int | None:
    """Free bytes on the file system of `folder`, which need not exist yet; None if unknown."""
    existing = next(
        (place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()), None
    )
    try:
        return shutil.disk_usage(existing).free if existing else None
    except OSError:
        return None


def _link_speed_if_it_can_be_measured() -> float | None:
    """Link speed in bytes/s, or None when memory cannot be pinned or the device is full."""
    try:
        return _link_speed()
    except RuntimeError as error:
        logger.warning("could not measure the speed of the link to the GPU: %s", _one_line(error))
        return None


def _link_speed() -> float:
    import torch

    source = torch.empty(LINK_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    # Without this torch caches both buffers, with the host's pages pinned.
    del source, target
    if hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
    torch.cuda.empty_cache()
    return LINK_PROBE_BYTES / best


@cache
def context_bytes(device: str) -> int | None:
    """Device memory that this process takes without tensors: CUDA context, kernel code, cuBLAS.

    device: `cuda` or `cuda:N`. Measured as the growth of the memory in use according to NVML, so
    allocations of other programs count only during the measurement. None if this process already
    has a context on the device, or NVML does not know the device.
    """
    import torch

    target = torch.device("cuda", torch.device(device).index or 0)
    if _has_context(target):
        return None
    try:
        uuid = str(getattr(torch.cuda.get_device_properties(target), "uuid", ""))
        before = used_bytes(uuid)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.ones(16, 16, device=target, dtype=dtype)
            torch.mm(x, x)
        torch.cuda.synchronize(target)
        del x
        torch.cuda.empty_cache()
        after = used_bytes(uuid)
    except RuntimeError:  # a full or broken device: whoever asks it next says so
        return None
    if before is None or after is None or not 0 < after - before <= MOST_CONTEXT_BYTES:
        return None
    return after - before


def _has_context(device: Any) -> bool:
    """Whether this process has a context on the device; reading a GPU's name creates none."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return has_context is None or bool(has_context(device.index))


def _version(package: str) -> str | None:
    """Version of an installed package; Triton has several package names."""
    from lowvram_kernels.constraints import TRITON_PACKAGES

    for name in TRITON_PACKAGES if package == "triton" else (package,):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
