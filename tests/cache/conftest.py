"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cache.disk import Scratch
from support.cached_paths import scratch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rows() -> Iterator[Scratch]:
    with scratch() as opened:
        yield opened
