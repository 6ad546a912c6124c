"""The benchmark of the whole model, on a tiny one: real runs of the command line in control
groups.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.store.reader import Store

StoreOf = Callable[[str], Store]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs control groups"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    module, group = (
        importlib.import_module("scripts.bench.whole"),
        importlib.import_module("scripts.bench.memory_group"),
    )
    try:
        with group.memory_group(2**30):
            return module
    except group.NoGroupError as error:
        pytest.skip(str(error))


def test_rows_of_two_budgets_hold_what_runs_took(
    bench: Any, tiny_store: StoreOf, tmp_path: Path
) -> None:
    found = list(
        bench.rows(
            tiny_store("int8").path, bench.Clip("64x64", 5, 2), ("1GB+1GB", "0.5GB+0.9GB"), tmp_path
        )
    )
    assert [(row.vram_budget_gb, row.ram_budget_gb) for row in found] == [(1.0, 1.0), (0.5, 0.9)]
    assert len({row.video_sha256 for row in found}) == 1
    assert all(
        0.1 < row.rss_gb <= row.plan_gb <= row.vram_budget_gb + row.ram_budget_gb for row in found
    )
    assert found[0].overhead == 0
    assert all(row.step_s > 0 and row.predicted_step_s > 0 for row in found)


def test_a_run_that_is_refused_is_no_row(bench: Any, tiny_store: StoreOf, tmp_path: Path) -> None:
    store = tiny_store("int8").path
    with pytest.raises(bench.RunFailed, match="use --ram"):
        bench.generate(store, bench.Clip("64x64", 5, 2), "0.5GB", "0.3GB", tmp_path / "clip.mp4")
    with pytest.raises(bench.RunFailed, match=r"by its cgroup v\d, and libraries alone take"):
        bench.generate(store, bench.Clip("64x64", 5, 2), "30MB", "30MB", tmp_path / "clip.mp4")
