"""Test calls of every op with poisoned output buffers, and the tolerances of their results.

Used by `check` and the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.ops import OPS
from lowvram_kernels.quantize_rows import LOW_STEPS
from lowvram_kernels.quantize_values import SUM_START, VALUE_MAX
from lowvram_kernels.tuning import PV_DTYPES

E4M3 = torch.float8_e4m3fn
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """An output of an op: a view into a poisoned buffer.

    whole: the buffer; cut: takes the view out of the buffer or a copy of it. The op must not write
    the elements outside the view.
    """

    whole: Tensor
    cut: Callable[[Tensor], Tensor]

    @classmethod
    def poisoned(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str = "cpu",
        cut: Callable[[Tensor], Tensor] | None = None,
    ) -> Output:
        """Return an output in a new buffer of `shape` filled with NaN (1-byte types: 0x5A).

        cut: default the whole buffer.
        """
        if dtype.is_floating_point and dtype.itemsize > 1:
            whole = torch.full(shape, float("nan"), dtype=dtype, device=device)
        else:
            whole = torch.full(shape, 0x5A, dtype=torch.uint8, device=device).view(dtype)
        return cls(whole, cut or (lambda tensor: tensor))


@dataclass(frozen=True)
class Case:
    """One call of an op: its inputs and outputs by argument name. op: a key of `ops.OPS`."""

    op: str
    inputs: Inputs
    outputs: dict[str, Output]

    def run(
        self, backend: str, plant: Callable[[Inputs], Inputs] | None = None
    ) -> dict[str, Tensor]:
        """Call the op on copies of the outputs and return the whole output buffers, on the CPU.

        backend: "reference" or "triton"; plant: returns the inputs with a fault injected. The
        reference always runs on the CPU, because the GPU libraries do not support every shape.
        Raises `UnsupportedOpError` if the Triton kernel does not support the call.
        """
        inputs = plant(dict(self.inputs)) if plant else self.inputs
        buffers = {name: output.whole.clone() for name, output in self.outputs.items()}
        if backend == "reference":
            inputs = {
                name: value.cpu() if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
            buffers = {name: buffer.cpu() for name, buffer in buffers.items()}
        views = {name: self.outputs[name].cut(buffer) for name, buffer in buffers.items()}
        op = OPS[self.op]
        if backend == "triton":
            reason = op.constraint(**inputs, **views)
            if reason:
                raise UnsupportedOpError(f"{self.op} does not support this call: {reason}")
            op.triton(**inputs, **views)
        else:
            op.reference(**inputs, **views)
        return {name: buffer.cpu() for name, buffer in buffers.items()}

    def mismatch(self, plant: Callable[[Inputs], Inputs] | None = None) -> str:
        """Compare Triton's outputs with the reference's; return the differences, empty if none.

        plant: as in `run`, applied to the Triton call alone.
        """
        expected, actual = joined(self.run("reference")), joined(self.run("triton", plant))
        return "; ".join(
            filter(
                None,
                (
                    difference(name, expected[name], actual[name], self.tolerance)
                    for name in expected
                ),
            )
        )

    @property
    def tolerance(self) -> float:
        """Largest accepted relative error of a float output; 0 means bit-identical.

        On a GPU exp2 and rsqrt have an error of 2^-22, and sums of e4m3 products have fewer bits.
        """
        if self.op == "quantized_linear":
            return 0.0 if self.inputs["a"].dtype == torch.int8 else 2e-3
        return 1e-3 if self.op == "attention_int8" else 3e-6


def joined(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join two codes of a value to one int32, in steps of the second; other outputs stay.

    A value near the middle of two steps of the first code may get either, with another second code.
    """
    if "low" not in outputs:
        return outputs
    codes = outputs["out"].int() * int(LOW_STEPS) + outputs["low"].int()
    return {name: value for name, value in outputs.items() if name != "low"} | {"out": codes}


def difference(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> str:
    """Describe how an output buffer differs from the expected one; empty if it is accepted.

    Codes (int8, e4m3) may differ by one step, in at most one of a thousand elements (or in one
    element), and joined codes in two of a hundred. Floats may differ by a relative error (L2 norm)
    of `tolerance`; 0 means bit-identical. NaN, the poison of unwritten elements, must be in the
    same places.
    """
    if expected.dtype in (torch.int8, torch.int32, E4M3):
        steps = (ordered(expected) - ordered(actual)).abs()
        changed = int((steps > 0).sum())
        few = steps.numel() // (1000 if expected.dtype != torch.int32 else 50)
        accepted = int(steps.max()) <= 1 and changed <= max(1, few)
        return "" if accepted else f"{name}: {changed} codes differ, by up to {int(steps.max())}"
    if not torch.equal(expected.isnan(), actual.isnan()):
        return f"{name}: other elements are unwritten"
    wide, other = expected.nan_to_num().double(), actual.nan_to_num().double()
    if not tolerance:
        return (
            ""
            if torch.equal(wide, other)
            else f"{name}: {int((wide != other).sum())} elements differ"
        )
    error = float((wide - other).norm() / wide.norm())
    return "" if error <= tolerance else f"{name}: relative error {error:.1e}"


def ordered(codes: Tensor) -> Tensor:
    """Map int8, int32 or e4m3 codes to int32 in the order of their values, one step per code."""
    if codes.dtype in (torch.int8, torch.int32):
        return codes.int()
    bits = codes.view(torch.uint8).int()  # sign and magnitude
    return torch.where(bits >= 128, 128 - bits, bits)


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Return standard normal fp32 values of `shape`, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def codes(
    *shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.int8
) -> Tensor:
    """Return random codes: uniform in -127..127 for int8, normal times 40 for e4m3."""
    if dtype == E4M3:
        return (random(*shape, seed=seed) * 40).clamp(-448, 448).to(E4M3).to(device)
    return torch.randint(
        -127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    ).to(device)


def linear(
    m: int,
    n: int,
    k: int,
    *,
    device: str = "cpu",
    code: torch.dtype = torch.int8,
    out: torch.dtype = torch.float32,
) -> Case:
    """Return a call of `quantized_linear`; `a` and `out` are views into wider matrices.

    [m, k] x [n, k]; code: dtype of the operands; out: dtype of the output.
    """
    inputs = {
        "a": codes(m, k + 16, device=device, dtype=code)[:, :k],
        "a_scale": random(m, 1, seed=1, device=device).abs(),
        "weight": codes(n, k, seed=2, device=device, dtype=code),
        "weight_scale": random(n, 1, seed=3, device=device).abs(),
        "bias": random(n, seed=4, device=device) * 1000,
    }
    return Case(
        "quantized_linear",
        inputs,
        {"out": Output.poisoned((m + 2, n + 8), out, device, lambda tensor: tensor[1:-1, :n])},
    )


def linear_gelu(
    m: int,
    n: int,
    k: int,
    *,
    device: str = "cpu",
    code: torch.dtype = torch.int8,
    out: torch.dtype = torch.float32,
) -> Case:
    """Return a call of `quantized_linear` with GELU, scaled so that y is in GELU's curved range."""
    case = linear(m, n, k, device=device, code=code, out=out)
    shrunk = {
        "a_scale": case.inputs["a_scale"] * (1e-4 / k**0.5),
        "bias": case.inputs["bias"] * 1e-3,
    }
    return Case("quantized_linear", case.inputs | shrunk | {"gelu": True}, case.outputs)


def linear_add(
    m: int,
    n: int,
    k: int,
    *,
    device: str = "cpu",
    code: torch.dtype = torch.int8,
    gated: bool = True,
    out: torch.dtype = torch.float32,
) -> Case:
    """Return a call of `quantized_linear` that adds y, or gate * y if `gated`, to its output.

    out: the dtype of the output; some sums are too large for fp16.
    """
    case = linear(m, n, k, device=device, code=code)
    inputs = case.inputs | {
        "gate": random(n, seed=5, device=device) if gated else None,
        "accumulate": True,
    }
    return Case(
        "quantized_linear",
        inputs,
        {"out": Output(random(m, n, seed=6, device=device).to(out), lambda tensor: tensor)},
    )


def rows(
    op: str,
    m: int,
    k: int,
    *,
    code: torch.dtype,
    rotated: bool,
    x: torch.dtype = torch.float32,
    two_codes: bool = False,
    device: str = "cpu",
) -> Case:
    """Return a call of an op that quantizes the rows of x: [m, k].

    op: "adaln_quantize", "quantize_rows" or "gelu_quantize"; code: dtype of the output; x: dtype of
    the input, a strided view with outlier channels and, for m > 1, a row of zeros; two_codes: with
    the outputs `low` and `low_scale`.
    """
    values = random(m, k + 8, device=device)[:, :k] * 3
    values[:, ::64] *= 20
    if m > 1:
        values[1] = 0
    inputs: Inputs = {"x": torch.cat((values, values), dim=1).to(x)[:, :k], "rotated": rotated}
    if op == "adaln_quantize":
        inputs |= {
            "scale": random(k, seed=1, device=device) + 1,
            "shift": random(k, seed=2, device=device),
            "eps": 1e-6,
        }
    outputs = {
        "out": Output.poisoned((m + 1, k), code, device, lambda tensor: tensor[:-1]),
        "out_scale": Output.poisoned((m, 1), torch.float32, device),
    }
    if two_codes:
        outputs |= {
            "low": Output.poisoned((m + 1, k), code, device, lambda tensor: tensor[:-1]),
            "low_scale": Output.poisoned((m, 1), torch.float32, device),
        }
    return Case(op, inputs, outputs)


def rms_rope(
    m: int,
    heads: int,
    *,
    rope: bool = True,
    smoothing: bool = True,
    head_dim: int = 128,
    device: str = "cpu",
) -> Case:
    """Return a call of `rms_rope_quantize` with m tokens; its output is a slice of the tokens.

    x is a column slice of a wider matrix, as when one product computes q, k and v.
    """
    dim = heads * head_dim
    angles = random(m, head_dim // 2, seed=2, device=device)
    inputs = {
        "x": random(m, 2 * dim, device=device).bfloat16()[:, dim:],
        "weight": random(dim, seed=1, device=device),
        "cos": angles.cos() if rope else None,
        "sin": angles.sin() if rope else None,
        "smoothing": random(heads, head_dim, seed=3, device=device) if smoothing else None,
        "eps": 1e-6,
    }
    outputs = {
        "out": Output.poisoned(
            (heads, m + 3, head_dim), torch.int8, device, lambda tensor: tensor[:, 1:-2]
        ),
        "out_scale": Output.poisoned(
            (heads, m + 3), torch.float32, device, lambda tensor: tensor[:, 1:-2]
        ),
    }
    return Case("rms_rope_quantize", inputs, outputs)


def values(
    n: int, heads: int, *, head_dim: int = 128, device: str = "cpu", code: torch.dtype = torch.int8
) -> Case:
    """Return a call of `quantize_values` with n keys; its outputs start at the second tile.

    code: the dtype of the stored values.
    """
    tiles = math.ceil(n / 64)
    outputs = {
        "out": Output.poisoned(
            (heads, head_dim, (tiles + 1) * 64), code, device, lambda tensor: tensor[:, :, 64:]
        ),
        "out_scale": Output.poisoned(
            (heads, tiles + 1, head_dim, 2),
            torch.float32,
            device,
            lambda tensor: tensor[:, 1:],
        ),
    }
    v = random(n, 2 * heads * head_dim, device=device).bfloat16()[:, : heads * head_dim]
    return Case("quantize_values", {"v": v}, outputs)


def attention(
    m: int,
    n: int,
    heads: int,
    *,
    head_dim: int = 128,
    device: str = "cpu",
    out: torch.dtype = torch.float32,
    pv: str = "int8",
) -> Case:
    """Return a call of `attention_int8` with m queries, a view into a larger buffer, and n keys.

    Logits are spread over about +-10, so that the tiles of keys have unequal weights. out: dtype of
    the output; pv: a key of `tuning.PV_DTYPES`.
    """
    tiles = math.ceil(n / 64)
    v = codes(heads, head_dim, tiles * 64, seed=2, device=device)
    if pv not in ("int8", "bf16"):  # scaled to the range that `quantize_values` stores
        dtype = PV_DTYPES[pv]
        v = (v.float() * (VALUE_MAX[dtype] / 127)).to(dtype)
    v[:, :, n:] = 0
    scale = random(heads, tiles, head_dim, seed=5, device=device).abs() + 0.1
    offset = torch.zeros_like(scale)
    if pv == "int8":
        sums = v.unflatten(-1, (tiles, 64)).sum(dim=-1).transpose(1, 2)
        offset = (128 * sums - SUM_START) * scale
    if pv == "bf16":  # rows of a wider matrix
        wide = random(n, 2 * heads * head_dim, seed=2, device=device).bfloat16()
        v = wide[:, : heads * head_dim]
    inputs = {
        "q": codes(heads, m + 5, head_dim, device=device)[:, 5:],
        "q_scale": random(heads, m + 5, seed=3, device=device)[:, 5:].abs() * 0.01 + 0.01,
        "k": codes(heads, n, head_dim, seed=1, device=device),
        "k_scale": random(heads, n, seed=4, device=device).abs() * 0.01 + 0.01,
        "v": v,
        "v_scale": None if pv == "bf16" else torch.stack((scale, offset), dim=-1),
    }
    whole = Output.poisoned((m + 1, heads * head_dim), out, device, lambda tensor: tensor[:-1])
    return Case("attention_int8", inputs, {"out": whole})
