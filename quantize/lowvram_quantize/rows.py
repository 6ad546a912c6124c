"""Quantizes a matrix in chunks of rows: each row's result depends on that row alone, so neither
chunks nor threads change a bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from optimum.quanto import AbsmaxOptimizer, qtype
from torch import Tensor

from lowvram.errors import NonFiniteError
from lowvram_quantize.rotate import rotate_

CHUNK_ELEMENTS = 2**19  # 2 MB of fp32: chunk and workspace stay in a core's cache
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a row of zeros gets this, not 0

Result = TypeVar("Result")


@dataclass(frozen=True)
class RowFormat:
    """`W·R ≈ codes * scale` per row. `round_`: fp32 quotients, in place, to values that the dtype
    of `qtype` holds (or rounds itself).
    """

    qtype: qtype
    rotated: bool
    round_: Callable[[Tensor], Any]


@dataclass
class ErrorSums:
    """Sums over elements w of what is stored and errors e = dequantized - w."""

    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    cross: float = 0.0
    largest: float = 0.0

    def add(self, other: ErrorSums) -> None:
        self.elements += other.elements
        self.signal += other.signal
        self.noise += other.noise
        self.cross += other.cross
        self.largest = max(self.largest, other.largest)

    @property
    def sqnr_db(self) -> float:
        """10·log10(Σw² / Σe²); infinite where nothing was lost."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """w·(w+e) / (|w|·|w+e|); 1 for zeros."""
        norms = self.signal * (self.signal + 2 * self.cross + self.noise)
        return (self.signal + self.cross) / math.sqrt(norms) if norms > 0 else 1.0


class RowEngine:
    """Runs a function over chunks of rows on its own threads, one core each. `device` does the
    arithmetic, threads feed it.
    """

    def __init__(self, threads: int | None = None, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.threads = threads or torch.get_num_threads()
        self._before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(
            self.threads, "lowvram-quantize", lambda: torch.set_num_threads(1)
        )
        self._local = threading.local()

    def __enter__(self) -> RowEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        # the workers' setting is also the default of later threads
        torch.set_num_threads(self._before)

    def over_rows(
        self, matrix: Tensor, work: Callable[[slice], Result], chunk_elements: int = CHUNK_ELEMENTS
    ) -> Iterator[Result]:
        """`work` of each range of rows of `matrix`, results in the order of the rows."""
        step = max(1, chunk_elements // max(1, matrix.shape[1]))
        return self._pool.map(
            work, [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
        )

    def workspace(self, shape: torch.Size, halves: int) -> list[Tensor]:
        """Fp32 buffers of this thread: two of `shape` and, flat, `halves` halves of one more."""
        count = shape.numel()
        sizes = (count, count, count // 2 * halves)
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = self._local.buffer = torch.empty(sum(sizes), device=self.device)
        first, second, half = buffer[: sum(sizes)].split(sizes)
        return [first.view(shape), second.view(shape), half]


def row_scales(absmax: Tensor, kind: qtype) -> Tensor:
    """`absmax / qmax: [N, 1] fp32`, by optimum-quanto's `AbsmaxOptimizer`, floored at
    `SMALLEST_SCALE`.

    absmax: [N, 1] fp32, max|w| of each row: it stands in for the row, whose scale it gives, so that
    no copy of |w| is made. It is on the CPU, since a GPU divides by a number by multiplying with
    its rounded inverse.
    Symmetric optimisers only: those of quanto that shift (`MaxOptimizer`, `HqqOptimizer`) need zero
    points, which `int8_tensorwise` has not.
    """
    scales: Tensor = AbsmaxOptimizer()(absmax, kind, axis=0)
    # quanto gives one row a scale without axes
    scales = scales.reshape(-1, 1).clamp_(min=SMALLEST_SCALE)
    if not torch.isfinite(scales).all():
        raise NonFiniteError(
            "weights are so large that their rotation overflows fp32: the checkpoint is damaged"
        )
    return scales


def quantize_rows(
    engine: RowEngine, weight: Tensor, form: RowFormat
) -> tuple[Tensor, Tensor, ErrorSums]:
    """Codes [N, K] in the format's dtype, scales [N, 1] fp32, and the error of `codes * scale`
    against what was rounded.
    """
    codes, scales = (
        torch.empty(weight.shape, dtype=form.qtype.dtype),
        torch.empty(weight.shape[0], 1),
    )

    def work(rows: slice) -> ErrorSums:
        x, y, half = engine.workspace(weight[rows].shape, 1)
        x.copy_(weight[rows])
        if form.rotated:
            rotate_(x, y, half)
        scale = row_scales(torch.abs(x, out=y).amax(1, keepdim=True).cpu(), form.qtype)
        scales[rows] = scale
        scale = scale.to(engine.device)
        torch.div(x, scale, out=y)
        form.round_(y)
        codes[rows] = y.to(form.qtype.dtype)
        y.copy_(codes[rows])
        return _error(x, y.mul_(scale))

    return codes, scales, _total(engine.over_rows(weight, work))


def cast_rows(engine: RowEngine, tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, ErrorSums]:
    """The tensor in `dtype`, rounded to nearest even, and what that lost."""
    result = torch.empty(tensor.shape, dtype=dtype)
    source, target = _as_matrix(tensor), _as_matrix(result)

    def work(rows: slice) -> ErrorSums:
        x, y, _ = engine.workspace(source[rows].shape, 0)
        x.copy_(source[rows])
        target[rows] = source[rows].to(dtype)
        return _error(x, y.copy_(target[rows]))

    return result, _total(engine.over_rows(source, work))


def count_nonfinite(engine: RowEngine, tensor: Tensor) -> int:
    """How many elements are NaN or infinite: one pass over the extremes, which NaN spreads into,
    where all are finite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    matrix = _as_matrix(tensor)
    return sum(
        engine.over_rows(matrix, lambda rows: _count_nonfinite(matrix[rows]), 8 * CHUNK_ELEMENTS)
    )


def _count_nonfinite(chunk: Tensor) -> int:
    if chunk.dtype.itemsize in (1, 8):
        # 8-bit floats have no comparisons; an fp64 must be finite as the fp32 that is made of it
        chunk = chunk.float()
    if all(math.isfinite(extreme.item()) for extreme in torch.aminmax(chunk)):
        return 0
    return int((~torch.isfinite(chunk)).sum())


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def _error(x: Tensor, dequantized: Tensor) -> ErrorSums:
    """Overwrites `dequantized`."""
    error = dequantized.sub_(x).view(-1)
    x = x.view(-1)
    signal, cross, noise = torch.dot(x, x), torch.dot(x, error), torch.dot(error, error)
    low, high = torch.aminmax(error)
    return ErrorSums(
        x.numel(), signal.item(), noise.item(), cross.item(), max(-low.item(), high.item())
    )


def _total(parts: Iterator[ErrorSums]) -> ErrorSums:
    total = ErrorSums()
    for part in parts:
        total.add(part)
    return total
