"""Questions to NVIDIA's management library: memory in use and the driver's version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def used_bytes(uuid: str) -> int | None:
    """Bytes in use on the GPU of this UUID, by all programs; None where NVML cannot tell.

    Unlike torch, NVML makes no context on the device.
    """
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"

    def ask(nvml: Any) -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(name)).used)

    return _asked(ask)


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where NVML cannot tell."""
    return _asked(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))


def _asked(question: Callable[[Any], T]) -> T | None:
    """The answer of NVML; None without the library, a driver or an answer."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
