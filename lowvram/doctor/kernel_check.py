"""Compare the kernels with their references on this GPU, and cache the result.

A result is valid for one GPU, driver, version of torch and Triton, and kernel code. The check runs
in subprocesses, so that a kernel that crashes the device does not affect the run. Torch is imported
inside functions only.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import OutputError
from lowvram.files.cache import cache_folder
from lowvram.files.sealed import read_sealed, write_sealed
from lowvram.hardware.cgroups import cpu_count

if TYPE_CHECKING:
    import torch
    from lowvram_kernels.check import Check

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
MOST_PROCESSES = 4  # each needs several hundred MB of the GPU for its context
TIMEOUT_S = 300.0  # compilation takes seconds; a longer check hangs


@dataclass(frozen=True)
class KernelKey:
    """Key of a cached check: it is valid only for exactly these values."""

    gpu: str
    capability: str
    driver: str
    torch: str
    triton: str
    kernels: str

    @property
    def file_name(self) -> str:
        """Name of the cache file, with a hash of the key."""
        digest = sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"kernels-{digest[:16]}.json"


@dataclass(frozen=True)
class KernelReport:
    """Results of the check, one `Check` per compared call; checked_now: not from the cache."""

    checks: tuple[Check, ...]
    checked_now: bool

    @property
    def problems(self) -> dict[str, str]:
        """Ops with a wrong kernel, and what is wrong."""
        from lowvram_kernels.check import problems

        return problems(self.checks)

    @property
    def unchecked(self) -> dict[str, str]:
        """Ops without a known problem that could not be compared, and why."""
        wrong = self.problems
        return {
            check.op: check.unchecked
            for check in reversed(self.checks)
            if check.unchecked and check.op not in wrong
        }

    @property
    def summary(self) -> str:
        """One line such as `7 of 7 agree with their references`, followed by the exceptions."""
        ops, wrong, open_ = (
            dict.fromkeys(check.op for check in self.checks),
            self.problems,
            self.unchecked,
        )
        parts = [f"{len(ops) - len(wrong) - len(open_)} of {len(ops)} agree with their references"]
        parts += [f"{op} does not ({problem})" for op, problem in wrong.items()]
        parts += [f"{op} was not checked ({reason})" for op, reason in open_.items()]
        return "; ".join(parts)


def trust_kernels(device: torch.device, refresh: bool = False) -> KernelReport | None:
    """Check the kernels, or use the cached result, and run ops with wrong kernels as references.

    To be called before the GPU is used. refresh: ignore the cache. Returns None if no kernel runs
    on `device`.
    """
    from lowvram_kernels import dispatch
    from lowvram_kernels.constraints import refused_gpu

    if (
        device.type != "cuda"
        or os.environ.get("LOWVRAM_BACKEND") == "reference"
        or refused_gpu(device) is not None
    ):
        return None
    report = kernel_report(device, refresh)
    dispatch.distrust(report.problems)
    for op, problem in report.problems.items():
        logger.warning(
            "%s runs as its slower torch reference: its kernel is wrong on this GPU (%s): "
            "see `lowvram doctor`",
            op,
            problem,
        )
    return report


def trust_kernels_before_a_run(device: torch.device) -> None:
    """Call `trust_kernels`, unless `LOWVRAM_BACKEND=triton` forces the kernels to be used."""
    if os.environ.get("LOWVRAM_BACKEND") != "triton":
        trust_kernels(device)


def kernel_report(
    device: torch.device, refresh: bool = False, folder: Path | None = None
) -> KernelReport:
    """Check the kernels of this GPU, or return the cached result.

    refresh: ignore the cache; folder: cache folder, `cache_folder()` by default. A new result is
    cached if every call could be compared.
    """
    import torch

    key = kernel_key(device)
    path = (folder or cache_folder()) / key.file_name
    known = None if refresh else _load(path, key)
    if known is not None:
        return KernelReport(known, False)
    logger.warning(
        "checking the kernels on %s: takes seconds, or up to a minute if they must be "
        "compiled; done once",
        key.gpu,
    )
    index = torch.cuda.current_device() if device.index is None else device.index
    report = KernelReport(tuple(check_in_processes(f"cuda:{index}")), True)
    if not report.unchecked:
        _save(path, key, report.checks)
    return report


def kernel_key(device: torch.device) -> KernelKey:
    """Key of the cached check for a CUDA device."""
    import torch
    from lowvram_kernels.check import sources_digest, triton_version

    from lowvram.doctor.measure import driver_version

    properties = torch.cuda.get_device_properties(device)
    architecture = str(getattr(properties, "gcnArchName", "")) if torch.version.hip else ""
    capability = architecture or f"{properties.major}.{properties.minor}"
    return KernelKey(
        str(properties.name),
        capability,
        driver_version(),
        torch.__version__,
        triton_version(),
        sources_digest(),
    )


def known_problems(device: torch.device) -> dict[str, str]:
    """Problems from the cached check of this GPU, without running a check; used by plans."""
    from lowvram_kernels.constraints import refused_gpu

    if device.type != "cuda" or refused_gpu(device) is not None:
        return {}
    key = kernel_key(device)
    return KernelReport(_load(cache_folder() / key.file_name, key) or (), False).problems


def check_in_processes(device: str, ops: Iterable[str] | None = None) -> list[Check]:
    """Check all calls of the ops (default: all ops) in a few subprocesses; results in op order.

    device: `cuda:N`. If a subprocess dies, that is reported as a problem of the op it was checking.
    """
    from lowvram_kernels.ops import OPS

    wanted = list(OPS if ops is None else ops)
    count = max(1, min(MOST_PROCESSES, cpu_count(), len(wanted)))
    groups = [wanted[number::count] for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = [
            check
            for checks in pool.map(lambda group: _check_group(device, group), groups)
            for check in checks
        ]
    return sorted(found, key=lambda check: wanted.index(check.op))


def _check_group(device: str, ops: Sequence[str]) -> list[Check]:
    """Check ops in a subprocess; if it dies, continue after the failing op in a new one."""
    from lowvram_kernels.check import Check, is_occupied

    left, found = list(ops), list[Check]()
    while left:
        checks, begun, ended = _run(device, left)
        found += checks
        if not ended:
            break
        culprit = begun or left[0]
        if is_occupied(ended):
            found += [Check(op, "all", unchecked=ended) for op in left[left.index(culprit) :]]
            break
        if not any(check.op == culprit and check.problem for check in checks):
            found.append(Check(culprit, "a call", ended))
        left = left[left.index(culprit) + 1 :]
    return found


def _run(device: str, ops: Sequence[str]) -> tuple[list[Check], str, str]:
    """Results of one subprocess, the op that it began last, and why it ended early, or nothing."""
    from lowvram_kernels.check import Check

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lowvram_kernels.check", device, *ops]
    errors: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        try:
            done = subprocess.run(  # noqa: S603  (a module of our own)
                command,
                env=environment,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
            errors = done.stderr.strip().splitlines()
            ended = f"its process ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"it hangs: no answer within {TIMEOUT_S:.0f} s"
        except OSError as error:
            ended = f"its process does not start: {error}"
        out.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
    if ended and errors:
        ended = f"{ended}: {errors[-1][:200]}"
    begun = [line["begin"] for line in lines if "begin" in line]
    return [Check(**line) for line in lines if "op" in line], begun[-1] if begun else "", ended


def _load(path: Path, key: KernelKey) -> tuple[Check, ...] | None:
    """The cached checks; None if the file is missing, damaged or has another key."""
    from lowvram_kernels.check import Check

    try:
        content: Any = read_sealed(path)
        if (
            content["version"] != CACHE_VERSION
            or content["key"] != asdict(key)
            or not content["checks"]
        ):
            return None
        return tuple(
            Check(**{name: str(value) for name, value in check.items()})
            for check in content["checks"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _save(path: Path, key: KernelKey, checks: Sequence[Check]) -> None:
    """Write the checks to the cache atomically; a failure is logged as a warning."""
    content = {
        "version": CACHE_VERSION,
        "key": asdict(key),
        "checks": [asdict(check) for check in checks],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, content)
    except (OSError, OutputError) as error:
        logger.warning("could not cache the check of the kernels: %s", error)
