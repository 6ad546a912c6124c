"""What a LoRA adds to one tensor: low-rank pairs, DoRA, LoKr, LoHa, full differences.

All is computed in fp64 and by rows, so that neither chunks nor processors change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowvram.checkpoint.readers.tensor_data import Rows

# Parts that a change of each kind needs; alpha and dora may be there beside them.
KINDS = {
    "LoRA": {"down", "up"},
    "difference": {"diff"},
    "bias": {"bias"},
    "replacement": {"set"},
    "LoKr": {"lokr_w1", "lokr_w2"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
}
Delta = Callable[[slice], Tensor]  # rows of a matrix -> [n, K] fp64


class WrongShape(ValueError):
    """A part does not fit the tensor; `part` is its name."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


def kind_of(parts: Sequence[str]) -> str | None:
    """The kind of a change from its parts; None for parts that are no change or several."""
    own = set(parts) - {"alpha", "dora"}
    for number in "12":  # LoKr stores a factor whole or as a product
        if {f"lokr_w{number}_a", f"lokr_w{number}_b"} <= own:
            own = own - {f"lokr_w{number}_a", f"lokr_w{number}_b"} | {f"lokr_w{number}"}
    kinds = [kind for kind, needed in KINDS.items() if own == needed]
    if not kinds or ("dora" in parts and kinds[0] not in ("LoRA", "LoKr", "LoHa")):
        return None
    return kinds[0]


def delta_of(kind: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Delta:
    """Rows of what a change of strength 1 adds to a matrix of `shape`; see `matrix_shape`.

    parts: by name, in any floating-point dtype (alpha in any). Raises `WrongShape`.
    """
    if kind == "LoRA":
        up, down = _flat(parts, "up", shape[0], None), _flat(parts, "down", None, shape[1])
        if up.shape[1] != down.shape[0] or not down.shape[0]:
            raise WrongShape("up", f"its rank is {up.shape[1]}, that of the other {down.shape[0]}")
        factor = _alpha(parts, down.shape[0])
        return lambda rows: (up[rows] @ down) * factor
    if kind == "LoHa":
        first = _product(parts, "hada_w1", shape)
        second = _product(parts, "hada_w2", shape)
        factor = _alpha(parts, first[1].shape[0])
        return lambda rows: (first[0][rows] @ first[1]) * (second[0][rows] @ second[1]) * factor
    if kind == "LoKr":
        return _kronecker(parts, shape)
    part = {"difference": "diff", "bias": "bias", "replacement": "set"}[kind]
    if parts[part].numel() != math.prod(shape):
        raise WrongShape(part, f"it is {list(parts[part].shape)}")
    matrix = parts[part].reshape(shape)  # as large as the weight: its rows alone become fp64
    return lambda rows: matrix[rows].double()


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as `Rows` has them: a vector is one row."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


class MergedRows:
    """Rows of a weight with changes merged: fp32, computed in fp64.

    Each change: (kind, its delta, strength, magnitudes of DoRA or None).
    """

    def __init__(
        self, base: Rows, changes: Sequence[tuple[str, Delta, float, Tensor | None]]
    ) -> None:
        self.shape = (base.shape[0], base.shape[1])
        self.dtype = torch.float32
        self._base = base
        self._changes = changes

    def __getitem__(self, rows: slice, /) -> Tensor:
        weight = self._base[rows].double()
        for kind, delta, strength, magnitudes in self._changes:
            if kind == "replacement":
                weight = delta(rows).clone()
            elif magnitudes is None:
                weight = weight + delta(rows) * strength
            else:
                turned = weight + delta(rows)
                lengths = turned.norm(dim=1, keepdim=True)
                turned *= magnitudes[rows] / torch.where(lengths == 0, 1.0, lengths)
                weight = weight + (turned - weight) * strength
        return weight.float()


def magnitudes_of(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
    """DoRA's magnitude of each row, [N, 1] fp64; None without DoRA. Raises `WrongShape`."""
    if "dora" not in parts:
        return None
    found = parts["dora"]
    if found.numel() != shape[0] or (found.ndim > 1 and found.shape[0] != shape[0]):
        raise WrongShape("dora", f"it is {list(found.shape)}; one magnitude a row is read")
    return found.double().reshape(-1, 1)


def _alpha(parts: Mapping[str, Tensor], rank: int) -> float:
    """alpha / rank; 1 without alpha."""
    if "alpha" not in parts:
        return 1.0
    if parts["alpha"].numel() != 1:
        raise WrongShape("alpha", f"it is {list(parts['alpha'].shape)}, not one number")
    return float(parts["alpha"].double().item()) / rank


def _flat(parts: Mapping[str, Tensor], part: str, rows: int | None, columns: int | None) -> Tensor:
    """A factor as a matrix in fp64, of so many rows or columns."""
    found = parts[part]
    if found.ndim < 2:
        raise WrongShape(part, f"it is {list(found.shape)}")
    matrix = found.double().flatten(1)
    if (rows is not None and matrix.shape[0] != rows) or (
        columns is not None and matrix.shape[1] != columns
    ):
        raise WrongShape(part, f"it is {list(found.shape)}")
    return matrix


def _product(
    parts: Mapping[str, Tensor], name: str, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    first, second = (
        _flat(parts, f"{name}_a", shape[0], None),
        _flat(parts, f"{name}_b", None, shape[1]),
    )
    if first.shape[1] != second.shape[0]:
        raise WrongShape(f"{name}_a", f"its rank is {first.shape[1]}, not {second.shape[0]}")
    return first, second


def _kronecker(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Delta:
    ranks, factors = [], []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append(_flat(parts, name, None, None))
            continue
        first, second = _flat(parts, f"{name}_a", None, None), _flat(parts, f"{name}_b", None, None)
        if first.shape[1] != second.shape[0]:
            raise WrongShape(f"{name}_a", f"its rank is {first.shape[1]}, not {second.shape[0]}")
        ranks.append(second.shape[0])
        factors.append(first @ second)
    one, two = factors
    if (one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]) != shape:
        raise WrongShape(
            "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a",
            f"the product of {list(one.shape)} and {list(two.shape)} is not {list(shape)}",
        )
    factor = _alpha(parts, ranks[0]) if ranks else 1.0

    def rows_of(rows: slice) -> Tensor:
        numbers = torch.arange(shape[0])[rows]
        left, right = one[numbers // two.shape[0]], two[numbers % two.shape[0]]
        return (left[:, :, None] * right[:, None, :]).reshape(len(numbers), shape[1]) * factor

    return rows_of
