"""Calls of every op with poisoned outputs, and what a kernel's results may differ by from its
reference's: for `check` and the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram_kernels.attention_int8 import VALUE_MAX
from lowvram_kernels.errors import UnsupportedOpError
from lowvram_kernels.ops import OPS
from lowvram_kernels.tuning import PV_DTYPES

E4M3 = torch.float8_e4m3fn
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """A tensor that an op writes: a view into a poisoned buffer whose other elements must stay as
    they are.
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
        if dtype.is_floating_point and dtype.itemsize > 1:
            whole = torch.full(shape, float("nan"), dtype=dtype, device=device)
        else:
            whole = torch.full(shape, 0x5A, dtype=torch.uint8, device=device).view(dtype)
        return cls(whole, cut or (lambda tensor: tensor))


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    op: str
    inputs: Inputs
    outputs: dict[str, Output]

    def run(
        self, backend: str, plant: Callable[[Inputs], Inputs] | None = None
    ) -> dict[str, Tensor]:
        """The whole output buffers, on the CPU, after a call on fresh copies; `plant` puts a fault
        into the inputs.

        The reference always runs on the CPU: libraries on a GPU do not take every shape.
        """
        inputs = plant(dict(self.inputs)) if plant else self.inputs
        wholes = {name: output.whole.clone() for name, output in self.outputs.items()}
        if backend == "reference":
            inputs = {
                name: value.cpu() if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
            wholes = {name: whole.cpu() for name, whole in wholes.items()}
        views = {name: self.outputs[name].cut(whole) for name, whole in wholes.items()}
        op = OPS[self.op]
        if backend == "triton":
            reason = op.constraint(**inputs, **views)
            if reason:
                raise UnsupportedOpError(f"{self.op} refuses this call: {reason}")
            op.triton(**inputs, **views)
        else:
            op.reference(**inputs, **views)
        return {name: whole.cpu() for name, whole in wholes.items()}

    def mismatch(self, plant: Callable[[Inputs], Inputs] | None = None) -> str:
        """What Triton's outputs have that the reference's may not; empty where they agree."""
        expected, actual = self.run("reference"), self.run("triton", plant)
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
        """Relative error of a float output; 0: the same bits. A GPU's exp2 and rsqrt are 2^-22 off,
        its sums of e4m3 products shorter.
        """
        if self.op == "quantized_linear":
            return 0.0 if self.inputs["a"].dtype == torch.int8 else 2e-3
        return 1e-3 if self.op == "attention_int8" else 3e-6


def difference(name: str, expected: Tensor, actual: Tensor, tolerance: float) -> str:
    """Codes may be one apart, one in a thousand of them; floats by `tolerance` in relative
    error.
    """
    if expected.dtype in (torch.int8, E4M3):
        apart = (ordered(expected) - ordered(actual)).abs()
        changed = int((apart > 0).sum())
        few = int(apart.max()) <= 1 and changed <= max(1, apart.numel() // 1000)
        return "" if few else f"{name}: {changed} codes, by up to {int(apart.max())}"
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
    """Codes as integers that are neighbours where the values are: e4m3 is sign and magnitude."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def codes(
    *shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.int8
) -> Tensor:
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
    """Rows of `a` and of `out` are parts of wider ones."""
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
    """Scaled so that y lies where GELU bends."""
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
) -> Case:
    case = linear(m, n, k, device=device, code=code)
    inputs = case.inputs | {
        "gate": random(n, seed=5, device=device) if gated else None,
        "accumulate": True,
    }
    return Case(
        "quantized_linear",
        inputs,
        {"out": Output(random(m, n, seed=6, device=device), lambda tensor: tensor)},
    )


def rows(
    op: str,
    m: int,
    k: int,
    *,
    code: torch.dtype,
    rotated: bool,
    x: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Outlier channels, a row of zeros where there are several, rows of x with a stride."""
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
    """x is half of a wider row, as q, k and v come out of one product; out lies between other
    tokens.
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
    tiles = math.ceil(n / 64)
    outputs = {
        "out": Output.poisoned(
            (heads, head_dim, (tiles + 1) * 64), code, device, lambda tensor: tensor[:, :, 64:]
        ),
        "out_scale": Output.poisoned(
            (heads, head_dim, tiles + 1), torch.float32, device, lambda tensor: tensor[:, :, 1:]
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
    """Logits spread over about +-10, so that tiles of keys matter unequally; queries are part of a
    larger buffer.
    """
    tiles = math.ceil(n / 64)
    v = codes(heads, head_dim, tiles * 64, seed=2, device=device)
    if pv != "int8":  # the same values, as large as `quantize_values` stores them
        dtype = PV_DTYPES[pv]
        v = (v.float() * (VALUE_MAX[dtype] / 127)).to(dtype)
    v[:, :, n:] = 0
    inputs = {
        "q": codes(heads, m + 5, head_dim, device=device)[:, 5:],
        "q_scale": random(heads, m + 5, seed=3, device=device)[:, 5:].abs() * 0.01 + 0.01,
        "k": codes(heads, n, head_dim, seed=1, device=device),
        "k_scale": random(heads, n, seed=4, device=device).abs() * 0.01 + 0.01,
        "v": v,
        "v_scale": random(heads, head_dim, tiles, seed=5, device=device).abs() + 0.1,
    }
    whole = Output.poisoned((m + 1, heads * head_dim), out, device, lambda tensor: tensor[:-1])
    return Case("attention_int8", inputs, {"out": whole})
