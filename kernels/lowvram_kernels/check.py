"""Compare every Triton kernel with its reference on one device, in small calls (seconds in all).

`python -m lowvram_kernels.check cuda:0 [OP ...]` prints JSON lines: {"begin": op} before each op
and one `Check` per call. As a separate process, it contains the faults of a kernel that breaks the
CUDA context.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lowvram_kernels import cases
from lowvram_kernels.ops import OPS
from lowvram_kernels.sizes import STORED_VALUES
from lowvram_kernels.tuning import PV_DTYPES, architecture, pv_choices

INT8, FP16 = torch.int8, torch.float16
DIM, FFN, HEADS = (
    5120,
    13824,
    40,
)  # of A14B, so that the variants compiled are those a model launches
DEVICE_LOST = 3  # exit code if the device is unusable after a fault
ROWS = {"int8, rotated": (INT8, True), "int8": (INT8, False), "fp8": (cases.E4M3, False)}


@dataclass(frozen=True)
class Check:
    """The result of one compared call.

    op: a key of `ops.OPS`; label: dtypes and options of the call.
    problem: one line about how the kernel differs from its reference or why it does not run; empty
    if they agree.
    unchecked: why the call could not be compared, for reasons other than the kernel; else empty.
    """

    op: str
    label: str
    problem: str = ""
    unchecked: str = ""


def checks(device: torch.device, ops: Iterable[str] = tuple(OPS)) -> Iterator[Check]:
    """Run the calls of each op and yield their results.

    A call that fails does not stop the others. After a fault that makes the device unusable, the
    remaining calls are reported as unchecked.
    """
    lost = ""
    for op in ops:
        for label, make in calls(op, device).items():
            if lost:
                yield Check(op, label, unchecked=f"the device was lost in {lost}")
                continue
            check = _checked(op, label, make)
            if _is_lost(device):
                lost = f"{op}, {label}"
                check = replace(
                    check, problem=check.problem or "the device is unusable after the call"
                )
            yield check


def problems(found: Iterable[Check]) -> dict[str, str]:
    """Return op -> its first problem, for the ops that have one."""
    first: dict[str, str] = {}
    for check in found:
        if check.problem:
            first.setdefault(check.op, f"{check.label}: {check.problem}")
    return first


def sources_digest() -> str:
    """Return 16 hex digits of the SHA-256 of this package's sources.

    A stored check result is valid only for the same digest.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def triton_version() -> str:
    """Return the version of the installed Triton; empty if it cannot be imported."""
    try:
        import triton
    except (ImportError, OSError):
        return ""
    return str(triton.__version__)


def calls(op: str, device: torch.device) -> dict[str, Callable[[], cases.Case]]:
    """Return label -> factory of a test call, for the calls of one op.

    They cover every dtype and epilogue in use, the widths of A14B, token counts that are no
    multiple of a tile, and grids of several programs along each axis.
    """
    where = str(device)
    if op == "quantized_linear":
        return {
            "int8": partial(cases.linear, 33, 65, 96, device=where),
            "int8, fp16": partial(cases.linear, 150, 328, 256, out=FP16, device=where),
            "int8, GELU": partial(cases.linear_gelu, 33, 72, 256, out=FP16, device=where),
            "int8, += gate * y": partial(cases.linear_add, 150, 328, 256, device=where),
            "int8, += y": partial(cases.linear_add, 33, 72, 256, gated=False, device=where),
            "int8, fp16 += y": partial(
                cases.linear_add, 33, 72, 256, gated=False, out=FP16, device=where
            ),
            "fp8": partial(cases.linear, 150, 328, 256, code=cases.E4M3, out=FP16, device=where),
            "fp8, += gate * y": partial(
                cases.linear_add, 33, 72, 256, code=cases.E4M3, device=where
            ),
        }
    if op in ("adaln_quantize", "quantize_rows", "gelu_quantize"):
        x, width = (
            torch.float32 if op == "adaln_quantize" else FP16,
            FFN if op == "gelu_quantize" else DIM,
        )
        return {
            label + (", two codes" if two else ""): partial(
                cases.rows,
                op,
                3,
                width,
                code=code,
                rotated=rotated,
                x=x,
                two_codes=two,
                device=where,
            )
            for label, (code, rotated) in ROWS.items()
            for two in ((False, True) if code == INT8 else (False,))
        }
    if op == "rms_rope_quantize":
        return {
            "rope, smoothing": partial(cases.rms_rope, 3, HEADS, device=where),
            "smoothing": partial(cases.rms_rope, 3, HEADS, rope=False, device=where),
            "rope, heads of 64": partial(
                cases.rms_rope, 9, 4, smoothing=False, head_dim=64, device=where
            ),
        }
    pvs = pv_choices(architecture(device))
    if op == "quantize_values":
        sizes = {"": (70, 2, 128), ", heads of 64": (130, 3, 64)}
        return {
            f"{pv}{label}": partial(
                cases.values, n, heads, head_dim=width, code=PV_DTYPES[pv], device=where
            )
            for pv in pvs
            if STORED_VALUES[pv].scaled
            for label, (n, heads, width) in sizes.items()
        }
    shapes = {"": (150, 130, 2, 128, torch.float32), ", heads of 64": (33, 64, 2, 64, FP16)}
    return {
        f"{pv}{label}": partial(
            cases.attention, m, n, heads, head_dim=width, pv=pv, out=out, device=where
        )
        for pv in pvs
        for label, (m, n, heads, width, out) in shapes.items()
    }


def _checked(op: str, label: str, make: Callable[[], cases.Case]) -> Check:
    try:
        return Check(op, label, make().mismatch())
    except Exception as error:  # compilers, drivers and kernels raise many types of error
        lines = str(error).strip().splitlines()
        message = lines[0][:200] if lines else type(error).__name__
        return (
            Check(op, label, unchecked=message)
            if is_occupied(str(error))
            else Check(op, label, f"does not run: {message}")
        )


def is_occupied(text: str) -> bool:
    """Return whether an error message means that the device's memory or the device is in use.

    Such an error is no fault of a kernel.
    """
    return re.search("out of memory|busy or unavailable", text, re.IGNORECASE) is not None


def _is_lost(device: torch.device) -> bool:
    """Return whether the CUDA context is unusable, as it is after some faults."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str]) -> int:
    """Check the ops on a device and print the results as JSON lines; return the exit code.

    arguments: the device, then the ops (default all).
    """
    device, *ops = torch.device(arguments[0]), *arguments[1:]
    for op in ops or tuple(OPS):
        print(json.dumps({"begin": op}), flush=True)
        for check in checks(device, (op,)):
            print(json.dumps(asdict(check)), flush=True)
        if _is_lost(device):
            return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
