"""Settings of every test run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.helpers.threads import forget_earlier_threads

if TYPE_CHECKING:
    from lowvram.store.reader import Store


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are slower on several threads than on one, and much slower beside other
    work.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what `lowvram doctor` measured for the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWVRAM_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_threads() -> None:
    """What `tests.helpers.threads` counts are the threads of this test."""
    forget_earlier_threads()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny_store` makes its stores."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_store(model_folder: Path) -> Callable[[str], Store]:
    """One tiny model, quantized once per session and format."""
    # kernels are tested where these libraries are missing
    from tests.helpers.checkpoints import tiny_config
    from tests.helpers.runs import make_store

    return cache(lambda format: make_store(model_folder, tiny_config(), format))


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """SIGINT interrupts this process, also where it was started as a shell's background job, which
    ignores it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
