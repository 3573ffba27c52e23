"""The closed form of streamed weights: within the budget, and no more is read than must be."""

from __future__ import annotations

import random

import pytest

from model.weights.residency import LayerBytes, WeightResidency

SCOUT = [LayerBytes(400, 4400)] * 6
MAVERICK = [LayerBytes(600), LayerBytes(400, 32000)] * 4


@pytest.mark.parametrize("layers", [SCOUT, MAVERICK, [LayerBytes(7, 11)], [LayerBytes(5), LayerBytes(9, 2)]])
def test_nothing_is_streamed_where_all_layers_fit(layers: list[LayerBytes]) -> None:
    total = sum(layer.total for layer in layers)
    for budget in (None, total, total + 1):
        residency = WeightResidency(layers, budget)
        assert not residency.is_streamed
        assert residency.kept == residency.peak == residency.total == total
        assert residency.read_a_step == 0
    assert WeightResidency(layers, total - 1).is_streamed


@pytest.mark.parametrize("layers", [SCOUT, MAVERICK])
def test_the_budget_is_used_and_kept(layers: list[LayerBytes]) -> None:
    total, largest = sum(layer.total for layer in layers), max(layer.total for layer in layers)
    before = total
    for budget in range(2 * largest, total, largest // 3):
        residency = WeightResidency(layers, budget)
        streamed = [residency.streamed(number) for number in range(len(layers))]
        needed = residency.kept + 2 * max(streamed[:-1])
        assert residency.peak == budget and residency.kept == total - sum(streamed)
        assert needed <= budget and (needed + len(layers) > budget or not any(streamed[:-1]))
        assert residency.read_a_step == sum(streamed[:-1]) <= before
        before = residency.read_a_step


@pytest.mark.parametrize(("budget", "peak", "ahead"), [(9600, 9600, 4800), (5000, 5000, 200), (1000, 4800, 0)])
def test_a_budget_below_two_layers_reads_less_ahead(budget: int, peak: int, ahead: int) -> None:
    residency = WeightResidency(SCOUT, budget)
    assert (residency.peak, residency.ahead) == (peak, ahead)
    assert (residency.kept, residency.read_a_step) == (0, 5 * 4800)


def test_small_layers_stay_and_the_last_one_is_not_in_the_cycle() -> None:
    residency = WeightResidency(MAVERICK, 100_000)
    assert [residency.streamed(number) for number in range(0, 8, 2)] == [0] * 4
    assert residency.streamed(7) == MAVERICK[7].total
    assert residency.streamed(1) == residency.streamed(3) == residency.streamed(5) == residency.streamed_a_layer


def test_less_is_read_than_a_cache_of_the_same_size_would_miss() -> None:
    """Simulates a cache of equal pieces that evicts the least recently used one, over the same cycle."""
    pieces, size = [(layer, piece) for layer in range(5) for piece in range(48)], 150
    cache: dict[tuple[int, int], None] = {}
    missed = 0
    for _ in range(4):
        missed = 0
        for piece in pieces:
            missed += piece not in cache
            cache.pop(piece, None)
            cache[piece] = None
            if len(cache) > size:
                del cache[next(iter(cache))]
    assert missed == len(pieces)
    assert WeightResidency([LayerBytes(4, 44)] * 6, size).read_a_step == 5 * 30


def test_random_layers_never_exceed_the_budget_or_a_layer() -> None:
    draw = random.Random(0)
    for _ in range(200):
        layers = [LayerBytes(draw.randint(0, 50), draw.choice([0, draw.randint(0, 900)])) for _ in range(6)]
        budget = draw.randint(0, 3000)
        residency = WeightResidency(layers, budget)
        assert residency.peak <= max(budget, max(layer.total for layer in layers))
        assert 0 <= residency.kept <= residency.total
        if residency.is_streamed and residency.peak == budget:
            assert residency.kept + residency.streamed_a_layer + residency.ahead <= budget
