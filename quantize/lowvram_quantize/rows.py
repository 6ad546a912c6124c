"""Quantize matrices row by row, in chunks of rows on several threads.

The result of a row depends on that row alone, so chunks and threads do not change it.
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

from lowvram.checkpoint.readers.tensor_data import Rows
from lowvram.errors import NonFiniteError
from lowvram_quantize.rotate import rotate_

CHUNK_ELEMENTS = 2**19  # 2 MB of fp32: chunk and workspace stay in a core's cache
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros, instead of 0

Result = TypeVar("Result")


@dataclass(frozen=True)
class RowFormat:
    """How rows are quantized: `W·R ≈ codes * scale` per row, or `W ≈ codes * scale`.

    qtype: quanto's type of the codes; rotated: whether R applies; round_: prepares fp32 quotients
    in place for the cast to the dtype of `qtype`.
    """

    qtype: qtype
    rotated: bool
    round_: Callable[[Tensor], Any]


@dataclass
class ErrorSums:
    """Sums over the elements w of a tensor and their errors e = dequantized - w.

    signal: Σw²; noise: Σe²; cross: Σw·e; largest: max|e|.
    """

    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    cross: float = 0.0
    largest: float = 0.0

    def add(self, other: ErrorSums) -> None:
        """Add the sums of other elements."""
        self.elements += other.elements
        self.signal += other.signal
        self.noise += other.noise
        self.cross += other.cross
        self.largest = max(self.largest, other.largest)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, 10·log10(Σw² / Σe²), in dB; infinite if exact."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity w·(w+e) / (|w|·|w+e|); 1 for zeros."""
        norms = self.signal * (self.signal + 2 * self.cross + self.noise)
        return (self.signal + self.cross) / math.sqrt(norms) if norms > 0 else 1.0


class RowEngine:
    """Runs a function over chunks of rows on its own threads; torch uses one core in each.

    threads: default torch's number of threads; device: does the arithmetic. Use it as a context
    manager, which restores torch's number of threads.
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
        # set_num_threads in a worker also sets the default of later threads
        torch.set_num_threads(self._before)

    def over_rows(
        self, matrix: Rows, work: Callable[[slice], Result], chunk_elements: int = CHUNK_ELEMENTS
    ) -> Iterator[Result]:
        """Call `work` for each chunk of rows of `matrix`; yield the results in row order."""
        step = max(1, chunk_elements // max(1, matrix.shape[1]))
        return self._pool.map(
            work, [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
        )

    def workspace(self, shape: torch.Size, halves: int) -> list[Tensor]:
        """Return fp32 buffers of this thread: two of `shape`, and a flat one.

        halves: the size of the flat buffer in halves of `shape`. Later calls reuse the memory.
        """
        count = shape.numel()
        sizes = (count, count, count // 2 * halves)
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = self._local.buffer = torch.empty(sum(sizes), device=self.device)
        first, second, half = buffer[: sum(sizes)].split(sizes)
        return [first.view(shape), second.view(shape), half]


def row_scales(absmax: Tensor, code_type: qtype) -> Tensor:
    """Return the scales `absmax / qmax`, [N, 1] fp32, at least `SMALLEST_SCALE`.

    absmax: [N, 1] fp32, max|w| of each row, on the CPU, because a GPU divides by a constant as a
    multiplication with its rounded inverse. optimum-quanto's `AbsmaxOptimizer` computes the scales;
    given absmax in place of the rows, it makes no copy of |w|. quanto's optimizers with a shift
    (`MaxOptimizer`, `HqqOptimizer`) need zero points, which `int8_tensorwise` does not have.
    Raises `NonFiniteError` if a scale is not finite.
    """
    scales: Tensor = AbsmaxOptimizer()(absmax, code_type, axis=0)
    # for a single row quanto returns a scale without dimensions
    scales = scales.reshape(-1, 1).clamp_(min=SMALLEST_SCALE)
    if not torch.isfinite(scales).all():
        raise NonFiniteError(
            "the weights are too large, their rotation overflows fp32: the checkpoint is damaged"
        )
    return scales


def quantize_rows(
    engine: RowEngine, weight: Rows, row_format: RowFormat
) -> tuple[Tensor, Tensor, ErrorSums]:
    """Quantize a weight [N, K]; return its codes, scales and error.

    Codes: [N, K] in the dtype of the format; scales: [N, 1] fp32; error: of `codes * scale`
    relative to the weight, which is rotated if the format says so.
    Raises `NonFiniteError` if the rotation overflows.
    """
    codes, scales = (
        torch.empty(tuple(weight.shape), dtype=row_format.qtype.dtype),
        torch.empty(weight.shape[0], 1),
    )

    def work(rows: slice) -> ErrorSums:
        chunk = weight[rows]
        x, y, half = engine.workspace(chunk.shape, 1)
        x.copy_(chunk)
        if row_format.rotated:
            rotate_(x, y, half)
        scale = row_scales(torch.abs(x, out=y).amax(1, keepdim=True).cpu(), row_format.qtype)
        scales[rows] = scale
        scale = scale.to(engine.device)
        torch.div(x, scale, out=y)
        row_format.round_(y)
        codes[rows] = y.to(row_format.qtype.dtype)
        y.copy_(codes[rows])
        return _error(x, y.mul_(scale))

    return codes, scales, _total(engine.over_rows(weight, work))


def cast_rows(engine: RowEngine, source: Rows, dtype: torch.dtype) -> tuple[Tensor, ErrorSums]:
    """Cast a matrix to `dtype`, rounded half to even; return it and its error."""
    target = torch.empty(tuple(source.shape), dtype=dtype)

    def work(rows: slice) -> ErrorSums:
        chunk = source[rows]
        x, y, _ = engine.workspace(chunk.shape, 0)
        x.copy_(chunk)
        target[rows] = chunk.to(dtype)
        return _error(x, y.copy_(target[rows]))

    return target, _total(engine.over_rows(source, work))


def count_nonfinite(engine: RowEngine, matrix: Rows) -> int:
    """Return the number of elements of a matrix that are NaN or infinite.

    If all are finite it takes one pass, for minimum and maximum, into which NaN propagates.
    """
    if not matrix.dtype.is_floating_point or not math.prod(matrix.shape):
        return 0
    return sum(
        engine.over_rows(matrix, lambda rows: _count_nonfinite(matrix[rows]), 8 * CHUNK_ELEMENTS)
    )


def _count_nonfinite(chunk: Tensor) -> int:
    if chunk.dtype.itemsize in (1, 8):
        # torch does not compare 8-bit floats; fp64 must be finite after its conversion to fp32
        chunk = chunk.float()
    if all(math.isfinite(extreme.item()) for extreme in torch.aminmax(chunk)):
        return 0
    return int((~torch.isfinite(chunk)).sum())


def _error(x: Tensor, dequantized: Tensor) -> ErrorSums:
    """Return the sums of x and dequantized - x; overwrites `dequantized`."""
    error = dequantized.sub_(x).view(-1)
    x = x.view(-1)
    signal, cross, noise = torch.dot(x, x), torch.dot(x, error), torch.dot(error, error)
    low, high = torch.aminmax(error)
    return ErrorSums(
        x.numel(), signal.item(), noise.item(), cross.item(), max(-low.item(), high.item())
    )


def _total(parts: Iterator[ErrorSums]) -> ErrorSums:
    """Return the sum of all parts."""
    total = ErrorSums()
    for part in parts:
        total.add(part)
    return total
