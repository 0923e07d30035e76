"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides at its first import whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers that do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN (the largest integer for integers), so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
