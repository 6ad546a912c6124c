"""Whether the kernels are right on this GPU: a small check of every op, then all tests, compiled by
several processes at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lowvram_kernels import check
from lowvram_kernels.ops import OPS

from scripts.bench import ROOT
from scripts.bench.speed import Shapes, own_calls
from scripts.bench.steps import Context, LeftOut, Row, Unit, workers

TESTS = "tests/gpu/test_kernels.py"


def units(context: Context) -> Iterator[Unit]:
    """Each runs in a process of its own (`bench_all.Step.parallel`)."""
    shards = 1 if context.rehearse else workers()
    found = [Unit(f"check {op}", partial(checked, op, context)) for op in OPS]
    found += [
        Unit(f"compile {name}", partial(compiled, name, context))
        for name in own_calls(Shapes.of(context, warm=True))
    ]
    parts = [f"{number}/{shards}" for number in range(1, shards + 1)]
    return iter(
        [
            *found,
            *(
                Unit(f"tests {part}", partial(tested, TESTS, part, context), ("pytest",))
                for part in parts
            ),
        ]
    )


def checked(op: str, context: Context) -> Iterator[Row]:
    """A row per call that is compared; `problem` is empty where kernel and reference agree."""
    problems = 0
    for found in check.checks(torch.device(context.device), (op,)):
        problem = found.problem or found.unchecked
        problems += bool(problem)
        yield {"op": found.op, "name": found.label, "problem": problem}
        context.require_time()
    if problems:
        raise WrongKernelError(f"{problems} of its calls disagree with the reference")


class WrongKernelError(Exception):
    """A kernel does not compute what its reference does."""


def compiled(name: str, context: Context) -> Iterator[Row]:
    """Runs the calls that the next steps measure once at a small size, so that they find them
    compiled.
    """
    begin = time.perf_counter()
    own_calls(Shapes.of(context, warm=True))[name]()
    yield {"name": name, "seconds": round(time.perf_counter() - begin, 2)}


class Report:
    """What pytest's tests did."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            said = (
                str(getattr(report.longrepr, "reprcrash", "") or report.longrepr)
                .strip()
                .splitlines()
            )
            self.failures.append(
                f"{report.nodeid.split('::', 1)[-1]}: {said[-1][:200] if said else 'no reason'}"
            )


def tested(file: str, shard: str, context: Context) -> Iterator[Row]:
    """Runs one part of a file of tests in this process. shard: `2/8` is the second eighth."""
    import pytest

    report = Report()
    for name in ("LOWVRAM_BACKEND", "LOWVRAM_PV"):  # the tests choose for themselves
        os.environ.pop(name, None)
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", f"--shard={shard}", str(ROOT / file)], plugins=[report]
    )
    yield {"name": file, **report.counts, "failures": report.failures}
    if report.failures or code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise WrongKernelError(
            f"{report.counts['failed']} tests failed, pytest ended with {int(code)}: "
            f"{'; '.join(report.failures[:3])}"
        )
    if context.device == "cuda" and not report.counts["passed"]:
        raise LeftOut(f"all {report.counts['skipped']} tests were skipped")
