"""Which backend runs an op: a reason for every refusal, a log line for every fall-back.

`LOWVRAM_BACKEND=reference|triton` forces one. Unforced, tensors on a GPU take the Triton kernel
where its constraints allow, and tensors on a CPU always take the torch reference; Triton's
interpreter runs only where `triton` is forced and TRITON_INTERPRET=1 is set. Triton itself is
imported when a kernel is first chosen.
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
    """One op: its torch reference, the module of its Triton wrapper of the same name, and what that
    refuses.
    """

    name: str
    reference: Callable[..., None]
    triton_module: str
    constraint: constraints.Refusal

    def refusal(self, *args: Any, **kwargs: Any) -> str | None:
        """Why the Triton kernel cannot run this call; None where it can."""
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
        return _wrapper(self.triton_module, self.name)


@cache
def _wrapper(module: str, name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(
        importlib.import_module(f"lowvram_kernels.{module}"), name
    )
    return function


OPS: dict[str, Op] = {}
_told: set[tuple[str, str]] = set()
_distrusted: dict[str, str] = {}


def distrust(problems: Mapping[str, str]) -> None:
    """From now on these ops, and no others, run on their references: op -> what
    `lowvram_kernels.check` found wrong with its kernel.
    """
    _distrusted.clear()
    _distrusted.update(
        {
            name: f"its kernel disagrees with its reference on this GPU ({problem})"
            for name, problem in problems.items()
        }
    )


def distrusted() -> tuple[str, ...]:
    """The ops that run on their references because their kernels are wrong here."""
    return tuple(_distrusted)


def choose(name: str, *args: Any, **kwargs: Any) -> Callable[..., None]:
    """The function that runs op `name` on these arguments.

    Raises `UnsupportedOpError` where the forced backend refuses, with its reason, and for an
    unknown op or backend.
    """
    wanted = os.environ.get("LOWVRAM_BACKEND", "")
    if name not in OPS:
        raise UnsupportedOpError(f"unknown op {name!r}: supported are {', '.join(sorted(OPS))}")
    if wanted and wanted not in BACKENDS:
        raise UnsupportedOpError(
            f"LOWVRAM_BACKEND={wanted}: use one of {', '.join(sorted(BACKENDS))}"
        )
    op = OPS[name]
    if wanted == "reference":
        return op.reference
    if not wanted and not (args and isinstance(args[0], Tensor) and args[0].is_cuda):
        _tell(name, "its tensors are on the CPU")
        return op.reference
    reason = op.refusal(*args, **kwargs)
    if reason is None:
        return op.triton
    if wanted:
        raise UnsupportedOpError(f"no backend can run {name}: {wanted}: {reason}")
    _tell(name, f"triton: {reason}")
    return op.reference


def _tell(name: str, reason: str) -> None:
    """One log line per op and reason."""
    if (name, reason) not in _told:
        _told.add((name, reason))
        log.info("%s runs on the torch reference: %s", name, reason)


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[object]:
    """Makes the tensors' GPU the current one: that is where Triton launches, whatever device its
    arguments lie on.
    """
    on_gpu = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
    return torch.cuda.device_of(args[0]) if on_gpu else nullcontext()


def op(constraint: constraints.Refusal) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes an op of its torch reference: calls run on the backend that `choose` names, with the
    reference's own signature.

    The Triton kernel is the function of the same name in the module `<reference's module>_triton`.
    """

    def made(reference: Callable[P, None]) -> Callable[P, None]:
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

    return made
