"""Products by groups whose sizes only the device knows, against the loop over experts that reads counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import model.grouped
import model.moe
from model.grouped import group_ends, grouped_product, stored_product
from model.moe import MoE, SplitExperts
from model.quantization.choice import Quantization
from model.weights.loading import load_checkpoint
from support.toy_checkpoints import DIVISIBLE, Kind, Toys, write_kind
from support.waits import NoWaits


def layers(model: torch.nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints whose widths the kernel takes, by the experts of a token."""
    found = {top_k: tmp_path_factory.mktemp("divisible") for top_k in (1, 2)}
    for top_k, folder in found.items():
        kind = Kind(DIVISIBLE | {"num_experts_per_tok": top_k, "num_hidden_layers": 1, "no_rope_layers": [1]})
        write_kind(folder, "divisible", kind, 0.25, seed=top_k)
    return found


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 7, 50])
def test_groups_equal_the_loop(
    folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch, top_k: int, tokens: int
) -> None:
    layer = layers(load_checkpoint(folders[top_k]))[0]
    x = torch.randn(1, tokens, layer.router.in_features, generator=torch.Generator().manual_seed(tokens))
    expected = layer(x)
    monkeypatch.setattr(MoE, "_is_grouped", lambda self, tokens, copies: True)
    with NoWaits():
        found = layer(x)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4-g32", "fp8"])
@pytest.mark.parametrize("tile", [1, 10**4, 2**27])
def test_stored_experts_equal_the_loop(
    folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch, kind: str, tile: int
) -> None:
    """Their matrices are expanded in parts, the same rows of all experts."""
    layer = layers(load_checkpoint(folders[1], quantization=Quantization.parse(kind)))[0]
    assert isinstance(layer.experts, SplitExperts)
    x = torch.randn(1, 41, layer.router.in_features, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    monkeypatch.setattr(MoE, "_is_grouped", lambda self, tokens, copies: True)
    monkeypatch.setattr(model.grouped, "TILE_ELEMENTS", tile)
    with NoWaits():
        found = layer(x)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_experts_without_rows() -> None:
    groups = torch.tensor([1, 1, 3])
    ends = group_ends(groups, 5)
    assert ends.dtype == torch.int32 and ends.tolist() == [0, 2, 2, 3, 3]
    weights = torch.randn(5, 4, 8)
    x = torch.randn(3, 4)
    expected = torch.stack([x[0] @ weights[1], x[1] @ weights[1], x[2] @ weights[3]])
    assert torch.allclose(grouped_product(x, weights, ends), expected, atol=1e-6)
    apart = [weight.t().contiguous() for weight in weights]
    assert torch.allclose(stored_product(x, apart, ends), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "widths", "copies", "is_split", "expected"),
    [
        (torch.bfloat16, (48, 16), 100, False, True),
        (torch.bfloat16, (48, 16), 1, False, True),
        (torch.bfloat16, (48, 16), 100, True, True),
        (torch.bfloat16, (48, 16), 1, True, False),  # all experts would be expanded for one token
        (torch.float32, (48, 16), 100, False, False),
        (torch.bfloat16, (42, 16), 100, False, False),
        (torch.bfloat16, (48, 22), 100, False, False),
    ],
)
def test_which_products_are_grouped(
    toys: Toys,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    widths: tuple[int, int],
    copies: int,
    is_split: bool,
    expected: bool,
) -> None:
    layer = layers(load_checkpoint(toys("scout", 0.25).folder))[0]
    kind = SplitExperts if is_split else model.moe.FusedExperts
    monkeypatch.setattr(kind, "widths", widths)
    if is_split:
        layer.experts = SplitExperts([])
    rows = torch.empty(copies, 42, dtype=dtype)
    assert not layer._is_grouped(rows, copies)  # on this CPU
    monkeypatch.setattr(model.moe, "has_kernel", lambda device: True)
    assert layer._is_grouped(rows, copies) == expected


def test_a_wait_is_noticed() -> None:
    """The control of the mode that these tests rely on."""
    x = torch.arange(3)
    waits = [x.sum().item, lambda: int(x[0]), (x > 1).nonzero, lambda: x[x > 1], lambda: x.bincount(minlength=5)]
    for wait in waits:
        with NoWaits(), pytest.raises(AssertionError, match="the host waits"):
            wait()
