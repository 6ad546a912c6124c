"""Settings of every test run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are slower on several threads than on one, and much slower beside other work."""
    torch.set_num_threads(1)
