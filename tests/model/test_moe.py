"""Products of rounded numbers of rows, as 16-bit experts compute them on a CPU, against those of exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import model.moe
from model.moe import MoE
from model.weights.loading import load_checkpoint
from support.toy_checkpoints import Toys


def layers(model: torch.nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [2, 4, 32])
@pytest.mark.parametrize("name", ["scout", "top_2"])
def test_rounding_changes_nothing(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, name: str, granularity: int, dtype: torch.dtype
) -> None:
    layer = layers(load_checkpoint(toys(name, 0.25).folder, dtype=dtype))[0]
    width = layer.router.in_features
    generator = torch.Generator().manual_seed(granularity)
    for tokens in (1, 2, 7, 50):
        x = torch.randn(1, tokens, width, generator=generator).to(dtype)
        monkeypatch.setattr(model.moe, "_granularity", lambda *_: 1)
        exact = layer(x)
        monkeypatch.setattr(model.moe, "_granularity", lambda *_: granularity)
        rounded = layer(x)
        assert rounded.shape == exact.shape
        assert (rounded - exact).abs().max() <= {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype] * exact.abs().max()


def test_products_come_in_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8192 tokens: at most 16 shapes an expert in 16 bits, and no rounding in float32 or for a few tokens."""
    of: Any = model.moe._granularity
    half, full = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    assert [of(half, 8192, experts) for experts in (4, 16, 128)] == [128, 32, 4]
    assert [of(half, tokens, 16) for tokens in (1, 255, 511, 512, 8191)] == [1, 1, 1, 2, 16]
    assert of(full, 8192, 16) == 1
