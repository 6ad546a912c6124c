"""The check of every kernel against its reference on the device at hand: small calls of all that a
model launches, seconds in all.

`python -m lowvram_kernels.check cuda:0 [OP ...]` prints JSON lines, `begin` of each op and the
result of each call: a kernel that breaks the device breaks that process alone.
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
from lowvram_kernels.tuning import PV_DTYPES, architecture, pv_choices

INT8, BF16 = torch.int8, torch.bfloat16
DIM, FFN, HEADS = 5120, 13824, 40  # of A14B: Triton compiles what a model launches
DEVICE_LOST = 3  # exit code of a process whose device answers no more
ROWS = {"int8, rotated": (INT8, True), "int8": (INT8, False), "fp8": (cases.E4M3, False)}


@dataclass(frozen=True)
class Check:
    """One call that was compared. op: a key of `ops.OPS`; label: its dtypes and options.

    problem: empty where the kernel agrees with its reference, else what differs, or why it does not
    run, in one line;
    unchecked: why it could not be compared, which says nothing about the kernel.
    """

    op: str
    label: str
    problem: str = ""
    unchecked: str = ""


def checks(device: torch.device, ops: Iterable[str] = tuple(OPS)) -> Iterator[Check]:
    """Runs the calls of each op. A call that fails, however it does, ends no other; once the device
    is lost the rest is unchecked.
    """
    lost = ""
    for op in ops:
        for label, make in calls(op, device).items():
            if lost:
                yield Check(op, label, unchecked=f"the device was lost at {lost}")
                continue
            check = _checked(op, label, make)
            if _is_lost(device):
                lost = f"{op}, {label}"
                check = replace(check, problem=check.problem or "the device stops answering")
            yield check


def problems(found: Iterable[Check]) -> dict[str, str]:
    """Op -> its first problem, of those that have one."""
    first: dict[str, str] = {}
    for check in found:
        if check.problem:
            first.setdefault(check.op, f"{check.label}: {check.problem}")
    return first


def sources_digest() -> str:
    """16 hex digits of the kernels' code: other code has not been checked."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def triton_version() -> str:
    """The installed Triton's; empty where there is none."""
    try:
        import triton
    except (ImportError, OSError):
        return ""
    return str(triton.__version__)


def calls(op: str, device: torch.device) -> dict[str, Callable[[], cases.Case]]:
    """By label: the widths of A14B, ragged numbers of tokens, several programs in each direction,
    every dtype and epilogue in use.
    """
    where = str(device)
    if op == "quantized_linear":
        return {
            "int8": partial(cases.linear, 33, 65, 96, device=where),
            "int8, bf16": partial(cases.linear, 150, 328, 256, out=BF16, device=where),
            "int8, GELU": partial(cases.linear_gelu, 33, 72, 256, out=BF16, device=where),
            "int8, += gate * y": partial(cases.linear_add, 150, 328, 256, device=where),
            "int8, += y": partial(cases.linear_add, 33, 72, 256, gated=False, device=where),
            "fp8": partial(cases.linear, 150, 328, 256, code=cases.E4M3, out=BF16, device=where),
            "fp8, += gate * y": partial(
                cases.linear_add, 33, 72, 256, code=cases.E4M3, device=where
            ),
        }
    if op in ("adaln_quantize", "quantize_rows", "gelu_quantize"):
        x, width = (
            torch.float32 if op == "adaln_quantize" else BF16,
            FFN if op == "gelu_quantize" else DIM,
        )
        return {
            label: partial(cases.rows, op, 3, width, code=code, rotated=rotated, x=x, device=where)
            for label, (code, rotated) in ROWS.items()
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
            for label, (n, heads, width) in sizes.items()
        }
    shapes = {"": (150, 130, 2, 128, torch.float32), ", heads of 64": (33, 64, 2, 64, BF16)}
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
    except (
        Exception
    ) as error:  # compilers, drivers and kernels fail with errors of many kinds; each is the answer
        lines = str(error).strip().splitlines()
        said = lines[0][:200] if lines else type(error).__name__
        return (
            Check(op, label, unchecked=said)
            if is_occupied(str(error))
            else Check(op, label, f"does not run: {said}")
        )


def is_occupied(text: str) -> bool:
    """Whether an error says that others use the device, which is no fault of a kernel."""
    return re.search("out of memory|busy or unavailable", text, re.IGNORECASE) is not None


def _is_lost(device: torch.device) -> bool:
    """After some faults a CUDA context refuses everything."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str]) -> int:
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
