"""One tiny model, quantized once per session and format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.checkpoint.store import Store
from tests.checkpoints import tiny_config
from tests.runs import make_store


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_store(model_folder: Path) -> Callable[[str], Store]:
    stores: dict[str, Store] = {}

    def store(format: str) -> Store:
        if format not in stores:
            stores[format] = make_store(model_folder, tiny_config(), format)
        return stores[format]

    return store
