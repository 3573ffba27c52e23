"""What an observer is told equals the softmax of all scores, whatever computes attention and holds the keys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.attention import Attention, Part, Step
from model.kernels import watch
from model.kernels.attend import KVSegment, attention_state
from model.kernels.masks import AttentionMask
from model.kernels.registry import backend
from model.kernels.watch import LEAST_SHARE, Found, Looked, Watch, tell
from model.simd import attending

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
MASK = AttentionMask(None)


class Told:
    """An observer."""

    def __init__(self, within: range) -> None:
        self.within = within
        self.seen: dict[tuple[int, int], Looked] = {}

    def observe(self, layer: int, position: int, looked: Looked) -> None:
        self.seen[layer, position] = looked

    def as_dict(self, position: int) -> dict[tuple[int, int], float]:
        looked = self.seen[3, position]
        heads, positions, shares = (x.tolist() for x in looked)
        assert len(set(zip(heads, positions, strict=True))) == len(heads), "told twice"
        return dict(zip(zip(heads, positions, strict=True), shares, strict=True))


def sharp(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values of which a few get nearly all attention of `queries`."""
    keys, values = (torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(2))
    keys[:, :, 3::97] *= 4
    return keys, values


def expected(queries: Tensor, positions: range, keys: Tensor, within: range) -> list[dict[tuple[int, int], float]]:
    scores = queries[0].unflatten(0, (KV_HEADS, -1)) @ keys[0, :, None].transpose(-1, -2) * HEAD_DIM**-0.5
    scores = scores.flatten(0, 1)
    scores.masked_fill_(torch.arange(keys.shape[2]) > torch.tensor(list(positions))[:, None], -torch.inf)
    shares = scores.softmax(-1)
    return [
        {
            (head, key): float(shares[head, number, key])
            for head in range(HEADS)
            for key in within
            if shares[head, number, key] > LEAST_SHARE
        }
        for number in range(len(positions))
    ]


def agree(found: dict[tuple[int, int], float], wanted: dict[tuple[int, int], float]) -> None:
    """All that is told is right, and what is left out lies in ranges without much."""
    for place, share in found.items():
        assert share == pytest.approx(wanted.get(place, LEAST_SHARE), abs=2e-3), place
    assert {place for place, share in wanted.items() if share > 0.25} <= found.keys()
    assert found


@pytest.mark.parametrize("kernel", ["sdpa", "matmul", "flex", "eager"])
@pytest.mark.parametrize("has_code", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_what_is_told_are_shares_of_attention(
    kernel: str, has_code: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    monkeypatch.setattr(attending, "SMALLEST", 1 if has_code else 2**40)
    keys, values = sharp(1500, generator)
    queries = torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator) * 3
    positions, within = range(1500 - tokens, 1500), range(10, 1450)
    cuts = [0, 700, 1400, 1500]
    segments = [KVSegment(keys[:, :, a:b], values[:, :, a:b], a, stays=a != 700) for a, b in itertools.pairwise(cuts)]
    seen, told = Watch(queries, positions, within), Told(within)
    state = attention_state(queries, positions, segments, MASK, backend(kernel), seen)
    tell(told, 3, positions, state.lse[0], [seen.found])
    for position, wanted in zip(positions, expected(queries, positions, keys, within), strict=True):
        agree(told.as_dict(position), wanted)
    plain = attention_state(queries, positions, segments, MASK, backend(kernel))
    assert torch.equal(state.out, plain.out), "it only looks"


def test_of_codes_by_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(attending, "SMALLEST", 1)
    keys, values = sharp(640, generator)
    codes, scales = quantized(keys, 64)
    value_scales = values.abs().amax(-1, keepdim=True) / 127
    value_codes = (values / value_scales).round().to(torch.int8)
    plain = codes.float() * scales.repeat_interleave(64, 2)
    segment = KVSegment(
        codes, value_codes, 0, scales, value_scales, lambda: (plain, value_codes.float() * value_scales), stays=True
    )
    queries = torch.randn(1, HEADS, 2, HEAD_DIM, generator=generator) * 3
    positions = range(638, 640)
    seen, told = Watch(queries, positions, range(5, 600)), Told(range(5, 600))
    state = attention_state(queries, positions, [segment], MASK, backend("sdpa"), seen)
    tell(told, 3, positions, state.lse[0], [seen.found])
    for position, wanted in zip(positions, expected(queries, positions, plain, told.within), strict=True):
        agree(told.as_dict(position), wanted)


def quantized(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    scales = x.unflatten(2, (-1, group)).abs().amax(3) / 127
    return (x / scales.repeat_interleave(group, 2)).round().to(torch.int8), scales


def test_only_heavy_ranges_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 segments the one with all attention, and those at the beginning, as long as little else was seen."""
    generator = torch.Generator().manual_seed(7)
    looked = list[range]()
    scores = watch._scores

    def counting(queries: Tensor, some: watch._Range) -> Tensor:
        looked.append(some.keys)
        return scores(queries, some)

    monkeypatch.setattr(watch, "_scores", counting)
    monkeypatch.setattr(attending, "SMALLEST", 2**40)
    keys, values = (torch.randn(1, KV_HEADS, 40 * 32, HEAD_DIM, generator=generator) for _ in range(2))
    queries = torch.randn(1, HEADS, 1, HEAD_DIM, generator=generator)
    keys[0, :, 1000] = queries[0, ::3, 0] * 9
    segments = [KVSegment(keys[:, :, a : a + 32], values[:, :, a : a + 32], a) for a in range(0, 1280, 32)]
    seen = Watch(queries, range(1280, 1281), range(1280))
    attention_state(queries, range(1280, 1281), segments, MASK, backend("sdpa"), seen)
    assert any(1000 in keys for keys in looked) and len(looked) < 20


class Cache:
    """Keys and values in one piece."""

    def __init__(self, keys: Tensor, values: Tensor, shared: int) -> None:
        self.keys, self.values, self.shared = keys, values, shared

    def segments(self, layer: int, queries: range, within: range | None = None) -> Sequence[KVSegment]:
        return [KVSegment(self.keys, self.values, 0, stays=True).within(within or range(self.keys.shape[2]))]


@pytest.mark.parametrize("stop", [590, 620])  # before and behind where the keys that are shared end
def test_each_of_several_sequences_is_told_of_its_own(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys that they share are attended once by all queries, those behind by each sequence's."""
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(attending, "SMALLEST", 1)
    shared = sharp(600, generator)
    observers: list[Told | None] = [Told(range(1, stop)), None, Told(range(1, stop))]
    counts, parts, caches, start = (2, 1, 3), list[Part](), list[Cache](), 0
    for count, observer in zip(counts, observers, strict=True):
        own = [torch.randn(1, KV_HEADS, 40, HEAD_DIM, generator=generator) for _ in range(2)]
        keys, values = (torch.cat(pair, 2) for pair in zip(shared, own, strict=True))
        caches.append(Cache(keys, values, 600))
        positions = range(640 - count, 640)
        parts.append(Part(positions, positions, start, caches[-1], observer))  # type: ignore[arg-type]
        start += count
    queries = torch.randn(1, HEADS, start, HEAD_DIM, generator=generator) * 3
    step = Step(tuple(parts), 600, torch.empty(0), None, backend("sdpa"))
    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.layer, layer.uses_rope, layer.mask = 3, False, MASK
    layer.attended(queries, step, KVSegment(queries, queries, 0))
    for part, cache, observer in zip(parts, caches, observers, strict=True):
        if observer is None:
            continue
        here = queries[:, :, part.start : part.start + len(part.positions)]
        assert set(observer.seen) == {(3, position) for position in part.positions}
        wanted = expected(here, part.positions, cache.keys, observer.within)
        for position, shares in zip(part.positions, wanted, strict=True):
            agree(observer.as_dict(position), shares)


def test_layers_with_rope_are_not_watched() -> None:
    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.uses_rope = True
    part = Part(range(1), range(1), 0, None, Told(range(1)))
    assert layer._watch(torch.zeros(1, HEADS, 1, HEAD_DIM), range(1), [part]) is None
    layer.uses_rope = False
    assert layer._watch(torch.zeros(1, HEADS, 1, HEAD_DIM), range(1), [part._replace(observer=None)]) is None
    assert isinstance(Watch(torch.zeros(1, HEADS, 1, HEAD_DIM), range(1), range(1)).found, Found)
