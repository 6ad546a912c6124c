"""Promise 27: one run at a time per device and process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from lowvram.errors import UsageError
from lowvram.memory.turns import only_run
from lowvram.pipeline import Pipeline
from lowvram.progress import Progress
from lowvram.store.reader import Store

CPU = torch.device("cpu")


def pipeline_of(store: Store) -> Pipeline:
    return Pipeline(store, CPU, 2**40, 2**40, 0)


def test_p27_runs_of_two_threads_take_turns(tiny_store: Callable[[str], Store]) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    order: list[int] = []

    def generate(_: int) -> torch.Tensor:
        asked = pipeline.request("a", size=(64, 64), frames=5, steps=2)
        return pipeline.generate(
            asked, listener=lambda event: order.append(threading.get_ident())
        ).frames

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(generate, range(2))
    assert torch.equal(first, second)
    changes = sum(before != after for before, after in pairwise(order))
    assert changes <= 1


def test_p27_a_run_within_a_run_is_refused(tiny_store: Callable[[str], Store]) -> None:
    pipeline = pipeline_of(tiny_store("int8"))
    asked = pipeline.request("a", size=(64, 64), frames=5, steps=2)

    def listen(event: Progress) -> None:
        pipeline.generate(asked)

    with pytest.raises(UsageError, match="within a run"):
        pipeline.generate(asked, listener=listen)
    pipeline.generate(asked)


def test_p27_devices_are_independent_and_a_failed_run_frees_its_own() -> None:
    with only_run(CPU), only_run(torch.device("meta")):
        pass
    with pytest.raises(ValueError, match="broken"), only_run(CPU):
        raise ValueError("broken")

    def other_thread() -> None:
        with only_run(CPU):
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(other_thread).result(timeout=10)
