"""Constraints of the Triton kernels: whether one can run a call, and if not, why.

Each function named after an op takes the op's arguments and returns None if its kernel supports the
call, else the reason. Triton is imported only to test whether it starts.
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

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.float8_e4m3fn)
VALUES = (torch.int8, torch.float16, torch.float8_e4m3fn)
# Channels of the longest row that fits the registers of one program.
MAX_ROW = 32768
GELU_ALONE = "quantized_linear stores GELU(y) or adds gate * y to the residual stream, not both"
Constraint = Callable[..., str | None]

# The Triton of the oldest supported torch, and the newest with which every kernel was compiled
# (tests/kernels/test_triton_versions.py).
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
    """Return (major, minor) of the installed Triton, or None if none of its packages is found."""
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
    """Return why this installation has no usable Triton, or None."""
    return old_triton() if find_spec("triton") else "the triton package is not installed"


def old_triton() -> str | None:
    """Return why the installed Triton is too old, or None."""
    release = triton_release()
    if release is None or release >= OLDEST_TRITON:
        return None
    return f"Triton {_dotted(release)} is too old: {_dotted(OLDEST_TRITON)} or later is needed"


def untried_triton() -> str | None:
    """Return a note if the installed Triton is newer than `NEWEST_TRITON`, else None."""
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
    """Return why the installed Triton cannot start its GPU driver, or None.

    On first use Triton compiles a small library, which needs a C compiler and Python's headers.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # of any type: no kernel can run
        return (
            f"Triton does not start: {(' '.join(str(error).split()) or type(error).__name__)[:200]}"
        )
    return None


def refused_gpu(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on this GPU, or None.

    Triton may be missing or broken, or the GPU may lack supported 8-bit tensor cores.
    """
    return (
        no_triton()
        or broken_triton()
        or _old_device(torch.cuda.current_device() if device.index is None else device.index)
    )


def wrong_device(tensor: Tensor | None) -> str | None:
    """Return why the kernels cannot run on the device of `tensor`, or None.

    They need a CUDA or ROCm device, or a CPU with TRITON_INTERPRET=1 set.
    """
    if tensor is None or not tensor.is_cuda:
        if tensor is not None and os.environ.get("TRITON_INTERPRET") == "1":
            return no_triton()
        return "no Triton kernel runs on a CPU unless TRITON_INTERPRET=1 is set"
    return refused_gpu(tensor.device)


def scattered(tensors: Sequence[Tensor]) -> str | None:
    """Return a reason if the tensors are not all on one device, else None."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    return f"its tensors are on {' and '.join(devices)}" if len(devices) > 1 else None


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


def wrong_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """Return a reason if the dtype of argument `name` is not one of `dtypes`, else None."""
    if tensor.dtype in dtypes:
        return None
    return f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}"


def strided_rows(**tensors: Tensor | None) -> str | None:
    """Return a reason if the last dimension of an argument is strided, else None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            return f"the last dimension of {name} has stride {tensor.stride(-1)}, not 1"
    return None


def not_contiguous(**tensors: Tensor | None) -> str | None:
    """Return a reason if an argument is not contiguous, else None."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _unsupported_rows(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    rotated: bool,
    low: Tensor | None,
    low_scale: Tensor | None,
) -> str | None:
    """Return a reason if the kernels that quantize rows do not support the call, else None."""
    channels = x.shape[1]
    if channels > MAX_ROW:
        return f"rows of {channels} channels do not fit one program: the limit is {MAX_ROW}"
    if rotated and channels % 256:
        return f"rotation needs a multiple of 256 channels, got {channels}"
    for name, codes in (("out", out), ("low", low)):
        if rotated and codes is not None and (codes.stride(0) % 4 or codes.storage_offset() % 4):
            return (
                f"rotated rows are stored in words of 4 bytes, and {name} is not aligned to 4 bytes"
            )
    reason = (
        wrong_dtype("x", x, FLOATS)
        or wrong_dtype("out", out, CODES)
        or wrong_dtype("out_scale", out_scale, (torch.float32,))
        or strided_rows(x=x, out=out, low=low)
        or not_contiguous(out_scale=out_scale, low_scale=low_scale)
    )
    if reason is not None or low is None or low_scale is None:
        return reason
    if low.stride(0) != out.stride(0):
        return f"rows of low are {low.stride(0)} elements apart, those of out {out.stride(0)}"
    return (
        wrong_dtype("out", out, (torch.int8,))
        or wrong_dtype("low", low, (torch.int8,))
        or wrong_dtype("low_scale", low_scale, (torch.float32,))
    )


def quantize_rows(
    x: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> str | None:
    """Constraint of `quantize_rows` and `gelu_quantize`."""
    return _unsupported_rows(x, out, out_scale, rotated, low, low_scale)


def adaln_quantize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
    rotated: bool,
    low: Tensor | None = None,
    low_scale: Tensor | None = None,
) -> str | None:
    """Constraint of `adaln_quantize`."""
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.dim() != 1:
            return f"{name} has {tensor.dim()} dimensions: the kernel takes one vector for all rows"
        reason = wrong_dtype(name, tensor, (torch.float32,))
        if reason:
            return reason
    return not_contiguous(scale=scale, shift=shift) or _unsupported_rows(
        x, out, out_scale, rotated, low, low_scale
    )


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
    """Constraint of `quantized_linear`."""
    if gelu and (gate is not None or accumulate):
        return GELU_ALONE
    if a.dtype != weight.dtype:
        return f"a and weight need the same dtype, got {a.dtype} and {weight.dtype}"
    if a.shape[1] % 16:
        return f"K = {a.shape[1]} is not a multiple of 16, which 16-byte loads require"
    for name, tensor in (
        ("a_scale", a_scale),
        ("weight_scale", weight_scale),
        ("bias", bias),
        ("gate", gate),
    ):
        reason = None if tensor is None else wrong_dtype(name, tensor, (torch.float32,))
        if reason:
            return reason
    reason = (
        wrong_dtype("a", a, CODES)
        or wrong_dtype("out", out, FLOATS)
        or strided_rows(a=a, weight=weight, out=out)
    )
    return reason or not_contiguous(
        a_scale=a_scale, weight_scale=weight_scale, bias=bias, gate=gate
    )


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
    """Constraint of `rms_rope_quantize`."""
    reason = (
        _unsupported_head_dim(out.shape[2])
        or wrong_dtype("x", x, FLOATS)
        or wrong_dtype("out", out, (torch.int8,))
    )
    for name, tensor in (
        ("weight", weight),
        ("cos", cos),
        ("sin", sin),
        ("smoothing", smoothing),
        ("out_scale", out_scale),
    ):
        reason = reason or (None if tensor is None else wrong_dtype(name, tensor, (torch.float32,)))
    return (
        reason
        or strided_rows(x=x, out=out)
        or not_contiguous(weight=weight, cos=cos, sin=sin, smoothing=smoothing)
    )


def quantize_values(v: Tensor, out: Tensor, out_scale: Tensor) -> str | None:
    """Constraint of `quantize_values`."""
    if (
        not out.shape[2] - 64 < v.shape[0] <= out.shape[2]
        or out.shape[2] != 64 * out_scale.shape[1]
    ):
        return f"{v.shape[0]} keys do not fill {out.shape[2]} columns in tiles of 64"
    reason = (
        _unsupported_head_dim(out.shape[1])
        or wrong_dtype("v", v, FLOATS)
        or wrong_dtype("out", out, VALUES)
    )
    return (
        reason
        or wrong_dtype("out_scale", out_scale, (torch.float32,))
        or strided_rows(v=v, out=out)
        or not_contiguous(out_scale=out_scale[0])
    )


def attention_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    out: Tensor,
) -> str | None:
    """Constraint of `attention_int8`."""
    if v_scale is None and v.shape[0] != k.shape[1]:
        return f"{k.shape[1]} keys have {v.shape[0]} rows of values"
    if v_scale is not None and v.shape[-1] != -(-k.shape[1] // 64) * 64:
        return f"{k.shape[1]} keys do not fill {v.shape[-1]} value columns in tiles of 64"
    reason = _unsupported_head_dim(q.shape[2]) or wrong_dtype("out", out, FLOATS)
    values = VALUES if v_scale is not None else (torch.bfloat16,)
    for name, tensor, dtypes in (("q", q, VALUES[:1]), ("k", k, VALUES[:1]), ("v", v, values)):
        reason = reason or wrong_dtype(name, tensor, dtypes)
    reason = reason or (
        _no_e4m3(v.get_device()) if v.is_cuda and v.dtype == torch.float8_e4m3fn else None
    )
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            reason = reason or wrong_dtype(name, scale, (torch.float32,))
    reason = reason or strided_rows(q=q, q_scale=q_scale, k=k, k_scale=k_scale, v=v, out=out)
    if reason is None and v_scale is not None:
        reason = not_contiguous(v_scale=v_scale[0])
    step = 128 if v_scale is None else 64  # rows of v that one step of the kernel reads
    if reason is None and v.stride(-2) >= 2**31 // step:
        return f"rows of v are {v.stride(-2)} elements apart: the limit is {2**31 // step}"
    if reason is None and (q.stride(1) != q.shape[2] or k.stride(1) != k.shape[2]):
        return "the tokens of a head are not contiguous in q and k"
    return reason


def _unsupported_head_dim(width: int) -> str | None:
    """Return a reason if the kernels do not support heads of `width` channels, else None.

    A head needs a power of two of channels, and int8 tensor cores need at least 32. The models have
    64 or 128.
    """
    return None if width in (64, 128) else f"heads of {width} channels: the kernels take 64 or 128"
