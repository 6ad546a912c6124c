"""Fixtures: a store, a staged pipeline over it, and the digests of undisturbed runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lowvram.request import Request
from lowvram.store.reader import Store
from tests.faults.runs import CHOICE
from tests.helpers.checkpoints import tiny_config
from tests.helpers.runs import digest, make_store, plan_of
from tests.helpers.staged import StagedPipeline


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("exhaustion"), tiny_config(), "int8")


@pytest.fixture
def pipeline(store: Store) -> StagedPipeline:
    return StagedPipeline(store)


@pytest.fixture(scope="module")
def expected(store: Store) -> Callable[[Request], str]:
    """The digest of an undisturbed run."""
    known: dict[Request, str] = {}

    def of(request: Request) -> str:
        if request not in known:
            pipeline = StagedPipeline(store)
            known[request] = digest(
                pipeline.generate(request, plan=plan_of(pipeline, request, CHOICE)).frames
            )
        return known[request]

    return of
