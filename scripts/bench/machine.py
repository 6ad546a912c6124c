"""What machine `bench all` runs on: versions, the GPU's facts, and what the vendor's libraries,
the link and the disk reach here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from scripts.bench.steps import Context, LeftOut, Row, Unit, version_of
from scripts.bench.timing import measure, peaks

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pytest",
    "safetensors",
    "tokenizers",
    "psutil",
    "diffusers",
    "optimum-quanto",
    "ftfy",
    "av",
    "typer",
    "rich",
    "sageattention",
    "comfy-kitchen",
)
LINK_BYTES = 256 << 20


def units(context: Context) -> Iterator[Unit]:
    yield Unit("facts", lambda: facts(context))
    yield Unit("peaks", lambda: measured_peaks(context))
    yield Unit("link", lambda: link(context))


def facts(context: Context) -> Iterator[Row]:
    yield {
        "name": "versions",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda or torch.version.hip,
        **{package: version_of(package) for package in PACKAGES},
    }
    yield {
        "name": "tools",
        **{tool: bool(shutil.which(tool)) for tool in ("ncu", "nsys", "cc", "gcc")},
        "ptxas": ptxas_version(),
    }
    if context.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        yield {
            "name": "device",
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "sms": properties.multi_processor_count,
            "memory_gb": round(total / 1e9, 2),
            "free_gb": round(free / 1e9, 2),
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "driver": driver(),
        }


def measured_peaks(context: Context) -> Iterator[Row]:
    """TOPS of square products in bf16 and int8, GB/s of a copy: what rows of other steps are set
    against.
    """
    found = peaks(64, 4096, "cpu", repeats=2) if context.rehearse else peaks()
    for name, rate in found.items():
        yield {"name": f"peak {name}", "rate": rate, "unit": "GB/s" if name == "copy" else "TOPS"}


def link(context: Context) -> Iterator[Row]:
    """GB/s from pinned host memory to the device, and back."""
    if context.device != "cuda":
        raise LeftOut("there is no link without a device")
    host, device = (
        torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True),
        torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda"),
    )

    def copy(target: Tensor, source: Tensor, _: int) -> None:
        target.copy_(source, non_blocking=True)

    for name, target, source in (
        ("host to device", device, host),
        ("device to host", host, device),
    ):
        best = measure(partial(copy, target, source), repeats=5)[0]
        yield {"name": f"link {name}", "rate": LINK_BYTES / best / 1e6, "unit": "GB/s"}


def peaks_of(context: Context) -> dict[str, float]:
    """What the machine step measured here; empty where it did not."""
    return {
        row["name"].removeprefix("peak "): row["rate"]
        for row in context.rows("machine")
        if row.get("name", "").startswith("peak ")
    }


def driver() -> str:
    """The driver's version, as its own tool says it; asks and changes nothing."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return (
        done.stdout.strip().splitlines()[0]
        if done.returncode == 0 and done.stdout.strip()
        else "unknown"
    )


def ptxas_version() -> str:
    """Of the assembler that comes with Triton."""
    spec = find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return "not installed"
    name = "ptxas.exe" if sys.platform == "win32" else "ptxas"
    tool = os.path.join(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    try:
        said = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=False, timeout=20
        ).stdout.splitlines()
    except OSError:
        return "not found"
    return next((line.split(",")[1].strip() for line in said if "release" in line), "unknown")
