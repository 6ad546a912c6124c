"""What each Triton kernel takes: a reason in words for every call that it refuses. Triton itself is
only asked whether it starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from lowvram_kernels.errors import UnsupportedOpError

FLOATS = (torch.float32, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)
VALUES = (torch.int8, torch.float16, torch.float8_e4m3fn)
# Past this many channels a row no longer fits the registers of one program.
MAX_ROW = 32768
GELU_ALONE = "quantized_linear stores GELU(y) or adds gate * y to the residual stream, not both"
Refusal = Callable[..., str | None]


# The Triton that comes with the oldest torch, and the newest that every kernel was compiled with:
# tests/kernels/test_triton_versions.py.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
TRITON_PACKAGES = (
    "triton",
    "triton-windows",
    "triton-rocm",
    "pytorch-triton-rocm",
    "pytorch-triton",
)


@cache
def triton_release() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, whatever its package is called; None where that
    cannot be told.
    """
    for package in TRITON_PACKAGES:
        try:
            found = re.match(r"(\d+)\.(\d+)", version(package))
        except PackageNotFoundError:
            continue
        if found:
            return int(found[1]), int(found[2])
    return None


@cache
def no_triton() -> str | None:
    """Why Triton cannot run in this installation at all."""
    return old_triton() if find_spec("triton") else "the triton package is not installed"


def old_triton() -> str | None:
    """Why an installed Triton is refused for its age."""
    release = triton_release()
    if release is None or release >= OLDEST_TRITON:
        return None
    return f"Triton {_dotted(release)} is too old: {_dotted(OLDEST_TRITON)} or later is needed"


def untried_triton() -> str | None:
    """What is to be known of a Triton that is newer than those that the kernels were compiled
    with.
    """
    release = triton_release()
    if release is None or release <= NEWEST_TRITON:
        return None
    return (
        f"newer than Triton {_dotted(NEWEST_TRITON)}, the newest that the kernels were "
        f"compiled with"
    )


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


@cache
def broken_triton() -> str | None:
    """Why an installed Triton cannot reach the GPU: at its first call it builds a small library,
    with a C compiler and Python's headers.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever it is, no kernel will run; the log says why
        return (
            f"Triton does not start: {(' '.join(str(error).split()) or type(error).__name__)[:200]}"
        )
    return None


def refused_gpu(device: torch.device) -> str | None:
    """Why no Triton kernel runs on this GPU: Triton is missing or broken, or the card has no 8-bit
    tensor cores that it can use.
    """
    return (
        no_triton()
        or broken_triton()
        or _old_device(torch.cuda.current_device() if device.index is None else device.index)
    )


def wrong_device(tensor: Tensor | None) -> str | None:
    """Why the kernels cannot run where `tensor` lies: they need CUDA or ROCm, or the CPU and
    TRITON_INTERPRET=1.
    """
    if tensor is None or not tensor.is_cuda:
        if tensor is not None and os.environ.get("TRITON_INTERPRET") == "1":
            return no_triton()
        return "no Triton kernel runs on a CPU unless TRITON_INTERPRET=1 is set"
    return refused_gpu(tensor.device)


def scattered(tensors: Sequence[Tensor]) -> str | None:
    """Why no kernel can take these together: they lie on several devices."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    return f"its tensors lie on {' and '.join(devices)}" if len(devices) > 1 else None


@cache
def _old_device(index: int) -> str | None:
    from lowvram_kernels.tuning import architecture

    try:
        architecture(torch.device("cuda", index))
    except UnsupportedOpError as error:
        return str(error)
    return None


@cache
def _no_e4m3(index: int) -> str | None:
    from lowvram_kernels.tuning import architecture, multiplies_e4m3

    arch = architecture(torch.device("cuda", index))
    return (
        None
        if multiplies_e4m3(arch)
        else f"{arch} has no tensor cores for float8_e4m3fn values: they begin with sm_89"
    )


def one_of(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    if tensor.dtype in dtypes:
        return None
    return f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}"


def rows_contiguous(**tensors: Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            return f"the last dimension of {name} has stride {tensor.stride(-1)}, not 1"
    return None


def contiguous(**tensors: Tensor | None) -> str | None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _row_refusal(x: Tensor, out: Tensor, out_scale: Tensor, rotated: bool) -> str | None:
    channels = x.shape[1]
    if channels > MAX_ROW:
        return f"rows of {channels} channels do not fit one program: the limit is {MAX_ROW}"
    if rotated and channels % 256:
        return f"rotation needs a multiple of 256 channels, got {channels}"
    if rotated and (out.stride(0) % 4 or out.storage_offset() % 4):
        return "rotated rows are stored in words of 4 bytes and out is not aligned to them"
    reason = (
        one_of("x", x, FLOATS)
        or one_of("out", out, CODES)
        or one_of("out_scale", out_scale, (torch.float32,))
    )
    return reason or rows_contiguous(x=x, out=out) or contiguous(out_scale=out_scale)


def quantize_rows(x: Tensor, out: Tensor, out_scale: Tensor, *, rotated: bool) -> str | None:
    return _row_refusal(x, out, out_scale, rotated)


def adaln_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
    rotated: bool,
) -> str | None:
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.dim() != 1:
            return f"{name} has {tensor.dim()} dimensions: the kernel takes one vector for all rows"
        reason = one_of(name, tensor, (torch.float32,))
        if reason:
            return reason
    return contiguous(scale=scale, shift=shift) or _row_refusal(x, out, out_scale, rotated)


def quantized_linear(
    a: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gate: Tensor | None = None,
    accumulate: bool = False,
    gelu: bool = False,
) -> str | None:
    if gelu and (gate is not None or accumulate):
        return GELU_ALONE
    if a.dtype != weight.dtype:
        return f"operands of one dtype are multiplied, got {a.dtype} and {weight.dtype}"
    if a.shape[1] % 16:
        return f"K = {a.shape[1]} is not a multiple of 16: loads of 16 bytes need it"
    if accumulate and out.dtype != torch.float32:
        return f"the residual stream is {out.dtype}, not torch.float32"
    for name, tensor in (
        ("a_scale", a_scale),
        ("weight_scale", weight_scale),
        ("bias", bias),
        ("gate", gate),
    ):
        reason = None if tensor is None else one_of(name, tensor, (torch.float32,))
        if reason:
            return reason
    reason = (
        one_of("a", a, CODES)
        or one_of("out", out, FLOATS)
        or rows_contiguous(a=a, weight=weight, out=out)
    )
    return reason or contiguous(a_scale=a_scale, weight_scale=weight_scale, bias=bias, gate=gate)


def rms_rope_quantize(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    smoothing: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
) -> str | None:
    reason = _head_dim(out.shape[2]) or one_of("x", x, FLOATS) or one_of("out", out, (torch.int8,))
    for name, tensor in (
        ("weight", weight),
        ("cos", cos),
        ("sin", sin),
        ("smoothing", smoothing),
        ("out_scale", out_scale),
    ):
        reason = reason or (None if tensor is None else one_of(name, tensor, (torch.float32,)))
    return (
        reason
        or rows_contiguous(x=x, out=out)
        or contiguous(weight=weight, cos=cos, sin=sin, smoothing=smoothing)
    )


def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> str | None:
    if (
        not out.shape[2] - 64 < v.shape[0] <= out.shape[2]
        or out.shape[2] != 64 * out_scale.shape[2]
    ):
        return f"{v.shape[0]} keys do not fill {out.shape[2]} columns in tiles of 64"
    reason = _head_dim(out.shape[1]) or one_of("v", v, FLOATS) or one_of("out", out, VALUES)
    return (
        reason
        or one_of("out_scale", out_scale, (torch.float32,))
        or rows_contiguous(v=v, out=out, out_scale=out_scale)
    )


def attention_int8(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, out: Tensor
) -> str | None:
    if v.shape[-1] != -(-k.shape[1] // 64) * 64:
        return f"{k.shape[1]} keys do not fill {v.shape[-1]} value columns in tiles of 64"
    reason = _head_dim(q.shape[2]) or one_of("out", out, FLOATS)
    for name, tensor, dtypes in (("q", q, VALUES[:1]), ("k", k, VALUES[:1]), ("v", v, VALUES)):
        reason = reason or one_of(name, tensor, dtypes)
    reason = reason or (
        _no_e4m3(v.get_device()) if v.is_cuda and v.dtype == torch.float8_e4m3fn else None
    )
    for name, tensor in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        reason = reason or one_of(name, tensor, (torch.float32,))
    reason = reason or rows_contiguous(
        q=q, q_scale=q_scale, k=k, k_scale=k_scale, v=v, v_scale=v_scale, out=out
    )
    if reason is None and (q.stride(1) != q.shape[2] or k.stride(1) != k.shape[2]):
        return "tokens of q and k do not follow each other"
    return reason


def _head_dim(width: int) -> str | None:
    """Heads lie in one program as a power of two of channels, and int8 tensor cores want 32 of them
    at least: the models have 64 or 128.
    """
    return None if width in (64, 128) else f"heads of {width} channels: the kernels take 64 or 128"
