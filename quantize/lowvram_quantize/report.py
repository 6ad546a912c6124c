"""The quantization error of every tensor, as JSON beside the manifest and as a printed table."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from lowvram.checkpoint.readers.files import read_json
from lowvram.errors import CheckpointError
from lowvram.files.checked import checked
from lowvram.store.manifest import REPORT_NAME
from lowvram.units import format_bytes
from lowvram_quantize.rows import ErrorSums


@dataclass(frozen=True)
class TensorError:
    """The error of one stored tensor relative to its source.

    For a rotated tensor it is measured in the rotated space; rotation preserves norms.
    dtype: of the stored tensor; sqnr_db: signal to quantization noise ratio in dB, None if the
    tensor is exact or all zero; cosine: similarity of the dequantized tensor and the source.
    """

    component: str
    name: str
    dtype: str
    sqnr_db: float | None
    cosine: float
    max_abs_error: float

    @classmethod
    def of(cls, component: str, name: str, dtype: str, sums: ErrorSums) -> TensorError:
        """Return the error of a tensor from its sums, rounded as stored."""
        sqnr = round(sums.sqnr_db, 3) if math.isfinite(sums.sqnr_db) else None
        return cls(
            component, name, dtype, sqnr, round(sums.cosine, 8), float(f"{sums.largest:.6g}")
        )

    @property
    def kind(self) -> str:
        """Kind of tensor: `self_attn.q` of `blocks.7.self_attn.q.weight`; `rest` outside blocks."""
        parts = self.name.removesuffix(".weight").split(".")
        return ".".join(parts[2:]) if parts[0] == "blocks" else "rest"


@dataclass(frozen=True)
class QuantizationReport:
    """The result of a run: its recipe, sizes in bytes, and the error of every changed tensor."""

    recipe: dict[str, Any]
    source_bytes: int
    stored_bytes: int
    tensors: tuple[TensorError, ...]

    def summary(self) -> dict[str, Any]:
        """Sizes and the errors of each group of tensors, for scripts."""
        return {
            "recipe": self.recipe,
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "groups": summarize(self.tensors),
        }

    def to_json(self) -> str:
        """Return the report as JSON; interruptions of the run do not change it."""
        data = self.summary() | {"tensors": [asdict(error) for error in self.tensors]}
        return json.dumps(data, indent=1) + "\n"


def read_report(model: Path) -> QuantizationReport:
    """Read the report of a store; raise `CheckpointError` if it is missing or damaged."""
    path = model / REPORT_NAME
    data = read_json(model, path, advice="quantize again or restore it")
    try:
        errors = tuple(checked(entry, TensorError) for entry in data["tensors"])
        recipe, sizes = data["recipe"], (data["source_bytes"], data["stored_bytes"])
        return QuantizationReport(
            checked(recipe, dict[str, Any]), *checked(sizes, tuple[int, int]), errors
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable quantization report: {error}") from error


def summarize(errors: Iterable[TensorError]) -> list[dict[str, Any]]:
    """Summarize the errors per component and kind of tensor.

    Each entry has the number of tensors, the mean and minimum SQNR in dB, the minimum cosine and
    the largest absolute error.
    """
    groups: dict[tuple[str, str], list[TensorError]] = defaultdict(list)
    for error in errors:
        groups[error.component, error.kind].append(error)
    return [_group(component, kind, members) for (component, kind), members in groups.items()]


def _group(component: str, kind: str, members: list[TensorError]) -> dict[str, Any]:
    decibels = [error.sqnr_db for error in members if error.sqnr_db is not None]
    return {
        "component": component,
        "kind": kind,
        "tensors": len(members),
        "mean_sqnr_db": round(fmean(decibels), 3) if decibels else None,
        "min_sqnr_db": min(decibels, default=None),
        "min_cosine": min(error.cosine for error in members),
        "max_abs_error": max(error.max_abs_error for error in members),
    }


def summary_table(report: QuantizationReport) -> Table:
    """Return the report as a table with one row per component and kind of tensor."""
    sizes = f"{format_bytes(report.source_bytes)} -> {format_bytes(report.stored_bytes)}"
    table = Table(
        title=f"{report.recipe['format']}: {sizes}",
        caption="SQNR in dB, mean and least",
        box=box.SIMPLE_HEAD,
    )
    for name in ("component", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "SQNR", "least", "min cosine", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in summarize(report.tensors):
        means = [
            "exact" if group[key] is None else f"{group[key]:.2f}"
            for key in ("mean_sqnr_db", "min_sqnr_db")
        ]
        values = (
            str(group["tensors"]),
            *means,
            f"{group['min_cosine']:.6f}",
            f"{group['max_abs_error']:.3g}",
        )
        table.add_row(group["component"], group["kind"], *values)
    return table
