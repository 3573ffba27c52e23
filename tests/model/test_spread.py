"""Layers on several devices: every operand is where its layer is, and nothing else changes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cache.tiers
from cache.fork import ForkedKVCache
from cache.hybrid import HybridKVCache
from cache.offloaded import OffloadedKVCache
from cache.residency import Residency
from model.attention import Step
from model.kernels.watch import Looked
from model.programs import Programs
from model.quantization.choice import Quantization
from model.spread import Spread
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cached_paths import SavedRows, grid_cuts, new_cache
from support.device_labels import CPUS, DeviceLabels
from support.toy_checkpoints import BASE, CHUNK, SCOUT, Kind, write_kind
from support.transports import UnrulyTransport

KINDS = {
    "scout": SCOUT | {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 1, 0]},
    "tied": {"num_hidden_layers": 5, "tie_word_embeddings": True, "no_rope_layers": [0, 1, 0, 1, 1]},
}
SPREADS = {
    "scout": Spread((CPUS[0],) * 2 + (CPUS[1],) * 3),
    "tied": Spread((CPUS[0], CPUS[1], CPUS[1], CPUS[2], CPUS[2]), is_tied=True),
}
LENGTH = 5 * CHUNK + 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, (name, changes) in enumerate(KINDS.items()):
        found[name] = tmp_path_factory.mktemp(name)
        write_kind(found[name], name, Kind(changes), 0.25, seed)
    return found


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> DeviceLabels:
    """To be entered where operands are checked. With PyTorch's operations alone: others are not seen."""
    monkeypatch.setattr(Programs, "begin", lambda *_: False)
    return DeviceLabels()


def both(folder: Path, name: str, **how: Any) -> tuple[Transformer, Transformer]:
    """The model on one device, and spread. In memory, since products round by where a row begins in it."""
    one, spread = (load_checkpoint(folder, is_mapped=False, spread=spread, **how) for spread in (None, SPREADS[name]))
    assert spread.steps is None and spread.device == CPUS[0] and spread.last_device == SPREADS[name].last
    return one, spread


def label_weights(model: Transformer, labels: DeviceLabels) -> None:
    assert model.spread is not None
    for weight, parameter in model.named_parameters():
        labels.put(parameter, model.spread.of_weight(weight))


def token_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(BASE["vocab_size"], (1, count), generator=torch.Generator().manual_seed(seed))


def caches(one: Transformer, spread: Transformer, **where: Any) -> tuple[HybridKVCache, HybridKVCache]:
    assert spread.spread is not None
    ids = token_ids(LENGTH + 1)
    made = new_cache(one, ids, block_chunks=2, segment_chunks=1, **where)
    return made, new_cache(spread, ids, block_chunks=2, segment_chunks=1, devices=spread.spread.layers, **where)


def same(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None and b is not None and torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_layers_compute_where_they_are(folders: dict[str, Path], name: str, labels: DeviceLabels) -> None:
    """Prefill and single tokens: hidden states move once at every boundary, with what a step holds for its layers."""
    one, spread = both(folders[name], name)
    label_weights(spread, labels)
    with labels:
        kept = caches(one, spread)
    ids, where = token_ids(LENGTH), SPREADS[name]
    there = [where.layers[n] for n in range(1, len(where.layers)) if where.begins(n)]
    for cut in (2 * CHUNK, 3 * CHUNK + 1, LENGTH - 1, LENGTH):
        labels.moves.clear()
        new = ids[:, kept[0].offset : cut]
        expected = one(new, kept[0], logits="last")
        with labels:
            same(spread(new, kept[1], logits="last"), expected)
        hidden = [move.target for move in labels.moves if move.shape[-1:] == (BASE["hidden_size"],)]
        assert hidden == there + ([where.head] if where.head != where.last else [])
        tables = [move for move in labels.moves if move.shape[-1:] != (BASE["hidden_size"],)]
        assert len(tables) == 2 * len(there), tables  # rotations and temperatures
    for layer, store in enumerate(kept[1].layers):
        tensors = store.open[LENGTH // CHUNK] if isinstance(store, OffloadedKVCache) else store.window
        assert {labels.of(x) for x in tensors} == {where.layers[layer]}


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_stays_behind_is_noticed(
    folders: dict[str, Path], name: str, labels: DeviceLabels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    _, spread = both(folders[name], name)
    label_weights(spread, labels)
    monkeypatch.setattr(Step, "on", lambda step, device: step)
    with labels, pytest.raises(AssertionError, match=r"operands on \['cpu:0', 'cpu:1'\]"):
        spread(token_ids(9))


def test_several_sequences_drafts_and_observers(folders: dict[str, Path], labels: DeviceLabels) -> None:
    """Forks that share blocks, tokens that are taken back, and what queries attend to."""
    one, spread = both(folders["scout"], "scout")
    label_weights(spread, labels)
    told: list[dict[tuple[int, int], Looked]] = []
    logits = []
    with labels:
        kept = caches(one, spread)
    for model, kept_there, checked in zip((one, spread), kept, (contextlib.nullcontext(), labels), strict=True):
        with checked:
            model(token_ids(4 * CHUNK + 1), kept_there, logits="none")
            forks = [ForkedKVCache(kept_there, CHUNK) for _ in range(2)]
            log = Told(range(4 * CHUNK))
            found = model.forward_ragged([[3, 5], [7]], forks, observers=[log, None])
            assert found is not None
            forks[0].rewind(4 * CHUNK + 2)
            again = model.forward_ragged([[11], [13, 17]], forks)
            assert again is not None
            states = model.logits_of(model.states(token_ids(2, 9), kept_there.fork()))
            logits.append([*found, *again, states])
            told.append(log.found)
    for a, b in zip(*logits, strict=True):
        same(a, b)
    assert told[0].keys() == told[1].keys() and told[0]
    for key, expected in told[0].items():
        assert all(torch.equal(a, b) for a, b in zip(expected, told[1][key], strict=True))


class Told:
    """An observer that keeps everything."""

    def __init__(self, within: range) -> None:
        self.within = within
        self.found: dict[tuple[int, int], Looked] = {}

    def observe(self, layer: int, position: int, looked: Looked) -> None:
        self.found[layer, position] = looked


@pytest.mark.parametrize("kind", ["int8+attention"])
def test_stored_forms(folders: dict[str, Path], kind: str) -> None:
    """As the program computes, vector code included."""
    one, spread = both(folders["scout"], "scout", quantization=Quantization.parse(kind), dtype="bfloat16")
    kept = caches(one, spread)
    for part in token_ids(LENGTH).split([LENGTH - 3, 1, 2], dim=1):
        same(*(model(part, cache) for model, cache in zip((one, spread), kept, strict=True)))


@pytest.mark.parametrize("name", KINDS)
def test_blocks_lie_on_their_layers_device(
    folders: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device keeps the newest rows of its own layers, and saves what one device would."""
    monkeypatch.setattr(cache.tiers, "stays_on_host", lambda layout, queries: False)
    one, spread = both(folders[name], name)
    transports = {device: UnrulyTransport(n) for n, device in enumerate(SPREADS[name].devices)}
    rows = [SavedRows(tmp_path / which) for which in ("one", "several")]
    for saved in rows:
        saved.folder.mkdir()
    plain, _ = caches(one, spread, rows=rows[0])
    _, divided = caches(one, spread, rows=rows[1], residency=Residency(None, 1, True), transports=transports)
    ids = token_ids(LENGTH)
    for cut in grid_cuts(0, LENGTH, 2 * CHUNK, CHUNK):
        new = ids[:, plain.offset : cut]
        same(one(new, plain), spread(new, divided))
    for store in divided.stores:
        assert store.tiers.device == SPREADS[name].layers[store.layer]
        assert [block.is_on_device for block in store.sealed] == [False, True]
    assert [file.source.read_bytes() for file in rows[0].files] == [file.source.read_bytes() for file in rows[1].files]
    tails = plain.tail(), divided.tail()
    for layer, expected in tails[0].items():
        assert all(torch.equal(a, b) for a, b in zip(expected, tails[1][layer], strict=True))
    _, other = caches(one, spread, residency=Residency(None, 1, True), transports=transports)
    other.restore(LENGTH, rows[0].reopened(2), tail=tails[0])
    following = torch.tensor([[3]])
    same(one(following, plain.fork()), spread(following, other))
