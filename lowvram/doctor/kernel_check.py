"""Whether the kernels of this GPU agree with their references: checked once per GPU, driver, torch,
Triton and version, and remembered.

The check runs in processes of its own, so that a kernel that breaks the device breaks no run. Torch
loads inside functions.
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
from lowvram.files.io import replace_file
from lowvram.hardware.cgroups import cpu_count

if TYPE_CHECKING:
    import torch
    from lowvram_kernels.check import Check

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
MOST_PROCESSES = 4  # each takes some hundred MB of the GPU for its context
TIMEOUT_S = 300.0  # compilers take seconds; what takes longer hangs


@dataclass(frozen=True)
class KernelKey:
    """What a remembered check belongs to; any difference means checking anew."""

    gpu: str
    capability: str
    driver: str
    torch: str
    triton: str
    kernels: str

    @property
    def file_name(self) -> str:
        digest = sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"kernels-{digest[:16]}.json"


@dataclass(frozen=True)
class KernelReport:
    """The calls that were compared, and whether that was now."""

    checks: tuple[Check, ...]
    checked_now: bool

    @property
    def problems(self) -> dict[str, str]:
        """Op -> what is wrong with its kernel."""
        from lowvram_kernels.check import problems

        return problems(self.checks)

    @property
    def unchecked(self) -> dict[str, str]:
        """Op -> why it could not be compared, of those without a problem."""
        wrong = self.problems
        return {
            check.op: check.unchecked
            for check in reversed(self.checks)
            if check.unchecked and check.op not in wrong
        }

    @property
    def summary(self) -> str:
        """`7 of 7 agree with their references`, and by name those that do not."""
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
    """To be called before a GPU is used: applies the remembered check, or makes one. Ops whose
    kernels are wrong run on their references.

    refresh: check again whatever is remembered. None where no kernel runs on `device` anyway.
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
            "%s runs on its torch reference, slower: its kernel is wrong on this GPU (%s): "
            "see `lowvram doctor`",
            op,
            problem,
        )
    return report


def trust_kernels_before_a_run(device: torch.device) -> None:
    """`trust_kernels`, but where kernels are forced (`LOWVRAM_BACKEND=triton`): those run whatever
    they compute.
    """
    if os.environ.get("LOWVRAM_BACKEND") != "triton":
        trust_kernels(device)


def kernel_report(
    device: torch.device, refresh: bool = False, folder: Path | None = None
) -> KernelReport:
    """The remembered check of this GPU's kernels, else (or with `refresh`) a new one; it is
    remembered where every call was compared.
    """
    import torch

    key = kernel_key(device)
    path = (folder or cache_folder()) / key.file_name
    known = None if refresh else _load(path, key)
    if known is not None:
        return KernelReport(known, False)
    logger.warning(
        "checking the kernels on %s, once: some seconds, up to a minute where they must "
        "be compiled",
        key.gpu,
    )
    index = torch.cuda.current_device() if device.index is None else device.index
    report = KernelReport(tuple(check_in_processes(f"cuda:{index}")), True)
    if not report.unchecked:
        _save(path, key, report.checks)
    return report


def kernel_key(device: torch.device) -> KernelKey:
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
    """What an earlier check of this GPU found wrong, without checking anything: for plans."""
    from lowvram_kernels.constraints import refused_gpu

    if device.type != "cuda" or refused_gpu(device) is not None:
        return {}
    key = kernel_key(device)
    return KernelReport(_load(cache_folder() / key.file_name, key) or (), False).problems


def check_in_processes(device: str, ops: Iterable[str] | None = None) -> list[Check]:
    """All calls of all ops, in the ops' order. Ops are dealt to a few processes; what a process
    dies of is that op's problem.
    """
    from lowvram_kernels.ops import OPS

    wanted = list(OPS if ops is None else ops)
    count = max(1, min(MOST_PROCESSES, cpu_count(), len(wanted)))
    hands = [wanted[number::count] for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = [
            check
            for checks in pool.map(lambda hand: _check_hand(device, hand), hands)
            for check in checks
        ]
    return sorted(found, key=lambda check: wanted.index(check.op))


def _check_hand(device: str, ops: Sequence[str]) -> list[Check]:
    """One process after the other: where one ends early, the next goes on behind the op that it was
    at.
    """
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
    """(what one process found, the op that it began last, why it ended early or nothing)."""
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
    """None where there is no file, or where it is damaged or of another key: it is then made
    anew.
    """
    from lowvram_kernels.check import Check

    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _save(path: Path, key: KernelKey, checks: Sequence[Check]) -> None:
    """Atomically; with a warning where the folder cannot be written: the check is then made
    again.
    """
    content = {
        "version": CACHE_VERSION,
        "key": asdict(key),
        "checks": [asdict(check) for check in checks],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    except (OSError, OutputError) as error:
        logger.warning("the check of the kernels is not remembered: %s", error)
