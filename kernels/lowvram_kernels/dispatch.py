"""Select the backend that runs an op: its Triton kernel or its torch reference.

`LOWVRAM_BACKEND=reference|triton` forces a backend. By default, tensors on a GPU use the Triton
kernel if its constraints allow the call, and tensors on a CPU use the reference. Triton's
interpreter runs only with `LOWVRAM_BACKEND=triton` and TRITON_INTERPRET=1. Each fallback to the
reference is logged once with its reason. Triton is imported when a kernel is first selected.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from lowvram_kernels import constraints
from lowvram_kernels.errors import UnsupportedOpError

log = logging.getLogger("lowvram_kernels.dispatch")
P = ParamSpec("P")
BACKENDS = ("triton", "reference")


@dataclass(frozen=True)
class Op:
    """One op: its torch reference, its Triton kernel and the constraint of the kernel.

    triton_module: the module in this package that holds the Triton function of the same name.
    constraint: takes the op's arguments and returns why the kernel cannot run, or None.
    """

    name: str
    reference: Callable[..., None]
    triton_module: str
    constraint: constraints.Constraint

    def refusal(self, *args: Any, **kwargs: Any) -> str | None:
        """Return why the Triton kernel cannot run this call, or None if it can."""
        if self.name in _distrusted:
            return _distrusted[self.name]
        first = args[0] if args else None
        reason = constraints.wrong_device(first if isinstance(first, Tensor) else None)
        reason = reason or constraints.scattered(
            [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        )
        return reason or self.constraint(*args, **kwargs)

    @property
    def triton(self) -> Callable[..., None]:
        """The op's Triton function; the first access imports Triton."""
        return _wrapper(self.triton_module, self.name)


@cache
def _wrapper(module: str, name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(
        importlib.import_module(f"lowvram_kernels.{module}"), name
    )
    return function


OPS: dict[str, Op] = {}
_logged: set[tuple[str, str]] = set()
_distrusted: dict[str, str] = {}


def distrust(problems: Mapping[str, str]) -> None:
    """Disable the Triton kernels of exactly these ops; they run on their references from now on.

    problems: op -> the difference that `lowvram_kernels.check` found. Replaces earlier problems.
    """
    _distrusted.clear()
    _distrusted.update(
        {
            name: f"its kernel disagrees with its reference on this GPU ({problem})"
            for name, problem in problems.items()
        }
    )


def distrusted() -> tuple[str, ...]:
    """Return the ops whose kernels `distrust` has disabled."""
    return tuple(_distrusted)


def choose(name: str, *args: Any, **kwargs: Any) -> Callable[..., None]:
    """Return the function that runs op `name` on these arguments.

    Raises `UnsupportedOpError` if the forced backend does not support the call, with the reason,
    and for an unknown op or backend.
    """
    forced = os.environ.get("LOWVRAM_BACKEND", "")
    if name not in OPS:
        raise UnsupportedOpError(f"unknown op {name!r}: supported are {', '.join(sorted(OPS))}")
    if forced and forced not in BACKENDS:
        raise UnsupportedOpError(
            f"LOWVRAM_BACKEND={forced}: use one of {', '.join(sorted(BACKENDS))}"
        )
    op = OPS[name]
    if forced == "reference":
        return op.reference
    if not forced and not (args and isinstance(args[0], Tensor) and args[0].is_cuda):
        _log_once(name, "its tensors are on the CPU")
        return op.reference
    reason = op.refusal(*args, **kwargs)
    if reason is None:
        return op.triton
    if forced:
        raise UnsupportedOpError(f"no backend can run {name}: {forced}: {reason}")
    _log_once(name, f"triton: {reason}")
    return op.reference


def _log_once(name: str, reason: str) -> None:
    """Log a fallback to the reference, once per op and reason."""
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        log.info("%s runs on the torch reference: %s", name, reason)


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[object]:
    """Return a context in which the GPU of the first tensor is current.

    Triton launches on the current device, whatever the device of its arguments.
    """
    on_gpu = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
    return torch.cuda.device_of(args[0]) if on_gpu else nullcontext()


def op(constraint: constraints.Constraint) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a torch reference as an op: calls run on the backend that `choose` selects.

    The signature stays the reference's. The Triton kernel is the function of the same name in
    the module `<reference's module>_triton`.
    """

    def decorate(reference: Callable[P, None]) -> Callable[P, None]:
        name = reference.__name__
        OPS[name] = Op(
            name, reference, f"{reference.__module__.rpartition('.')[2]}_triton", constraint
        )

        @wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            function = choose(name, *args, **kwargs)
            with _device_of(args):
                function(*args, **kwargs)

        return run

    return decorate
