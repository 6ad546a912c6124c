"""Tests that need a CUDA device skip where there is none; `--shard=2/8` runs the second eighth of
them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="of the tests on a GPU run the I-th of N parts",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    number, shards = map(int, str(config.getoption("--shard", default="1/1")).split("/"))
    others = {id(item) for index, item in enumerate(here) if index % shards != number - 1}
    items[:] = [item for item in items if id(item) not in others]
