"""Watch a phase: which tensors of a failed attempt live when the next one begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram.sampling import state

NUMBER_BYTES = 8  # the step's number, a tensor in a solver's state


class Living(TorchDispatchMode):
    """Every tensor's memory that this thread makes while the mode is on, by a number that grows,
    until it is freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        self.made = 0
        self._alive: dict[int, int] = {}  # number -> bytes
        self._numbers: dict[int, int] = {}  # where a storage lies -> its number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata], self._alive[self.made] = self.made, storage.nbytes()
            weakref.finalize(storage, self._freed, storage._cdata).atexit = False
            self.made += 1

    def _freed(self, where: int) -> None:
        del self._alive[self._numbers.pop(where)]

    def since(self, first: int, but: tuple[torch.Tensor, ...] = ()) -> list[int]:
        """Bytes of what lives, was made from number `first` on and is more than a number; `but` may
        live.
        """
        kept = {self._numbers.get(tensor.untyped_storage()._cdata) for tensor in but}
        return [
            nbytes
            for number, nbytes in list(self._alive.items())
            if number >= first and number not in kept and nbytes > NUMBER_BYTES
        ]


class Attempts:
    """Watches a phase: whenever `again` is entered after a fault, nothing lives that the phase made
    before, but for what it is given.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        living: Living,
        phase: tuple[Any, str],
        again: tuple[Any, str],
    ) -> None:
        self.faults = self.checked = 0
        self.held: list[int] = []  # bytes in hand when memory ended
        self.left: list[list[int]] = []
        self._living, self._first = living, 0
        if phase != again:
            self._wrap(patch, *phase, self._begin)
        self._wrap(patch, *again, self._begin if phase == again else self._enter)

    def _wrap(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable[..., None]
    ) -> None:
        real = getattr(owner, name)

        def entered(*args: Any, **kwargs: Any) -> Any:
            before(*args)
            return real(*args, **kwargs)

        patch.setattr(owner, name, entered)

    def _begin(self, *args: Any) -> None:
        self._enter(*args)
        if self.faults == 0:
            self._first = self._living.made

    def _enter(self, *args: Any) -> None:
        if self.faults > self.checked:
            self.checked = self.faults
            self.left.append(self._living.since(self._first, tuple(tensors_in(args))))

    def fault(self, error: Callable[[], Exception]) -> Exception:
        """The error of a fault, after what is in hand was counted."""
        self.faults += 1
        self.held.append(sum(self._living.since(self._first)))
        return error()


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of arguments, states and solvers."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, state.RunState):
            yield from (value.latents, *value.solver.values())
        elif hasattr(value, "state_dict") and not isinstance(value, torch.nn.Module):
            yield from value.state_dict().values()
