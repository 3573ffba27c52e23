"""Whether Triton's kernels are used."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from model.gpu.available import has_triton

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    has_triton.cache_clear()


def test_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_triton(GPU)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_not_on_an_old_gpu_or_where_nothing_compiles(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """There is no such GPU here, or no Triton: the kernel fails."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "model.gpu.probe", None)
    assert not has_triton(GPU)
