"""Which backend runs an op: one row per op, a reason for every refusal, a log line for every fall-back.

`LOWVRAM_BACKEND=reference|triton` forces one. The Triton column holds `None` until an op's kernel exists; asking for it then
raises with that reason, and nothing falls back unseen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowvram.errors import UnsupportedError
from lowvram_kernels import adaln_quantize as _adaln
from lowvram_kernels import attention_int8 as _attention
from lowvram_kernels import quantize_rows as _rows
from lowvram_kernels import quantized_linear as _linear
from lowvram_kernels import rms_rope_quantize as _rms_rope

log = logging.getLogger("lowvram_kernels.dispatch")
BACKENDS = ("triton", "reference")


@dataclass(frozen=True)
class Op:
    """One op: its torch reference and, where one is written, its Triton kernel's wrapper."""

    name: str
    reference: Callable[..., None]
    triton: Callable[..., None] | None = None

    def refusal(self, backend: str) -> str | None:
        """Why `backend` cannot run this op here; None where it can."""
        if backend == "triton" and self.triton is None:
            return "no Triton kernel is written for it yet"
        return None


OPS = {
    op.name: op
    for op in (
        Op("adaln_quantize", _adaln.adaln_quantize),
        Op("quantize_rows", _rows.quantize_rows),
        Op("gelu_quantize", _rows.gelu_quantize),
        Op("quantized_linear", _linear.quantized_linear),
        Op("rms_rope_quantize", _rms_rope.rms_rope_quantize),
        Op("quantize_values", _attention.quantize_values),
        Op("attention_int8", _attention.attention_int8),
    )
}
_chosen: dict[tuple[str, str], Callable[..., None]] = {}


def choose(name: str) -> Callable[..., None]:
    """The function that runs op `name`. Raises `UnsupportedError` with each backend's reason, or for an unknown name."""
    wanted = os.environ.get("LOWVRAM_BACKEND", "")
    if (name, wanted) not in _chosen:
        _chosen[name, wanted] = _choose(name, wanted)
    return _chosen[name, wanted]


def _choose(name: str, wanted: str) -> Callable[..., None]:
    if name not in OPS:
        raise UnsupportedError(f"unknown op {name!r}: supported are {', '.join(sorted(OPS))}")
    if wanted and wanted not in BACKENDS:
        raise UnsupportedError(f"LOWVRAM_BACKEND={wanted}: use one of {', '.join(sorted(BACKENDS))}")
    op = OPS[name]
    refusals: list[str] = []
    for backend in (wanted,) if wanted else BACKENDS:
        reason = op.refusal(backend)
        if reason is None:
            if refusals:
                log.info("%s runs on %s: %s", name, backend, "; ".join(refusals))
            return op.reference if backend == "reference" or op.triton is None else op.triton
        refusals.append(f"{backend}: {reason}")
    raise UnsupportedError(f"no backend can run {name}: {'; '.join(refusals)}")


def _dispatched(name: str) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        choose(name)(*args, **kwargs)

    run.__name__, run.__doc__ = name, OPS[name].reference.__doc__
    return run


adaln_quantize = _dispatched("adaln_quantize")
quantize_rows = _dispatched("quantize_rows")
gelu_quantize = _dispatched("gelu_quantize")
quantized_linear = _dispatched("quantized_linear")
rms_rope_quantize = _dispatched("rms_rope_quantize")
quantize_values = _dispatched("quantize_values")
attention_int8 = _dispatched("attention_int8")
