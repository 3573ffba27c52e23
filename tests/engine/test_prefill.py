"""The driver: its grid, its progress, what it computes and what it does not, and how much it holds meanwhile."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import l4ctx.engine.prefill
from cache.grid import grid_period, prefill_grid
from cache.hybrid import HybridKVCache
from l4ctx.engine.prefill import DEFAULT_PREFILL_CHUNK_SIZE, LayerCount, as_batch, prefill
from model.costs import reading_operations
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cached_paths import failing, new_cache
from support.storages import LiveStorages
from support.toy_checkpoints import CHUNK, VOCABULARY, Toys

SIZES = (1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 16, 20, 21, 1000)  # around the attention chunk of 7 and its multiples


BLOCKS = (None, CHUNK, 2 * CHUNK, 3 * CHUNK, 5 * CHUNK)  # in tokens


def allowed_cuts(stop: int, size: int, chunk: int, block: int | None) -> set[int]:
    """The grid's definition, written out: multiples of whole blocks; or whole chunks, counted from each block's start;
    or tokens, counted from each chunk's."""
    if block is not None and size >= block:
        return set(range(0, stop, size // block * block))
    whole, step = (chunk, size) if size < chunk else (block, size // chunk * chunk)
    whole = stop if whole is None else whole
    return {cut for start in range(0, stop, whole) for cut in range(start, min(start + whole, stop), step)}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_the_grid_is_absolute(size: int, block: int | None) -> None:
    for stop in (1, 4, 7, 8, 14, 29, 50, 73, 2010):
        whole = list(prefill_grid(0, stop, size, CHUNK, block))
        cuts = allowed_cuts(stop, size, CHUNK, block) | {stop}
        assert [step.stop for step in whole] == sorted(cuts - {0})
        for start in {*range(0, stop + 1, 1 if stop < 60 else 97), stop}:
            steps = list(prefill_grid(start, stop, size, CHUNK, block))
            assert [p for step in steps for p in step] == list(range(start, stop))  # exactly, in order
            assert all(step and len(step) <= size for step in steps)
            assert {step.stop for step in steps} == {cut for cut in cuts if cut > start}
            if start in cuts:  # a resumed run does exactly the steps of an uninterrupted one
                assert steps == [step for step in whole if step.start >= start]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_at_multiples_of_the_period_a_run_can_go_on(size: int, block: int | None) -> None:
    """There is a cut, and what is behind it does not depend on what was before. The period divides a block, or is whole
    blocks: one, but for prefill chunks that are longer.
    """
    period = grid_period(size, CHUNK, block)
    stop = 12 * period + 3
    whole = list(prefill_grid(0, stop, size, CHUNK, block))
    cuts = {step.stop for step in whole}
    for start in range(period, stop, period):
        assert start in cuts
        resumed = list(prefill_grid(start, stop, size, CHUNK, block))
        assert resumed == [step for step in whole if step.start >= start]
        moved = [range(step.start - start, step.stop - start) for step in resumed]
        assert moved == list(prefill_grid(0, stop - start, size, CHUNK, block))  # it is a period
    if block is not None:
        assert period % block == 0 or block % period == 0
        assert period == CHUNK if size < CHUNK else period == max(block, size // block * block)
        if size < block:  # every block's end is a cut
            assert set(range(block, stop, block)) <= cuts


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_steps_and_attention_chunks(size: int, block: int | None) -> None:
    for step in prefill_grid(0, 300, size, CHUNK, block):
        first, last = step.start // CHUNK, (step.stop - 1) // CHUNK
        if size < CHUNK:
            assert first == last  # no step crosses a boundary
        else:
            assert step.start % CHUNK == 0 and (step.stop % CHUNK == 0 or step.stop == 300)


def test_the_grid_is_lazy_and_right_at_ten_million() -> None:
    steps = prefill_grid(10_000_000, 2**40, 8192, 8192)
    assert next(steps) == range(10_000_000, 1221 * 8192)
    assert next(steps) == range(1221 * 8192, 1222 * 8192)
    assert next(prefill_grid(10_000_000, 2**40, 3000, 8192)) == range(10_000_000, 1220 * 8192 + 6000)
    assert next(prefill_grid(10_000_000, 2**40, 20_000, 8192, 4 * 8192)) == range(10_000_000, 1222 * 8192)
    assert next(prefill_grid(10_000_000, 2**40, 80_000, 8192, 4 * 8192)) == range(10_000_000, 1224 * 8192)
    assert list(prefill_grid(5, 5, 8192, 8192)) == []
    with pytest.raises(AssertionError):
        next(prefill_grid(0, 5, 0, CHUNK))


@pytest.fixture
def scout(toys: Toys) -> Transformer:
    return load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block_chunks", [1, 4])
@pytest.mark.parametrize("size", [1, 5, CHUNK, 16, 100])
def test_progress_ends_at_the_total(toys: Toys, scout: Transformer, size: int, block_chunks: int) -> None:
    ids = tokens(61)
    cache = new_cache(scout, ids, block_chunks=block_chunks)
    for start, stop in ((0, 17), (17, 18), (18, 60)):  # three prefills, each behind what is there
        progress = []
        for state in prefill(scout, cache, ids[0, start:stop].tolist(), prefill_chunk_size=size):
            assert cache.offset == start + state.done  # committed when it is reported
            assert state.held == cache.held()
            progress.append(state)
        grid = prefill_grid(start, stop, size, CHUNK, block_chunks * CHUNK)
        assert [state.step for state in progress] == list(grid)
        assert [state.start + state.done for state in progress] == [state.step.stop for state in progress]
        assert {(state.start, state.total) for state in progress} == {(start, stop - start)}
        assert progress[-1].done == stop - start
        seconds = [0.0, *(state.seconds for state in progress)]
        assert all(
            0 < state.step_seconds <= state.seconds - before for state, before in zip(progress, seconds, strict=False)
        )
    both = 2 * toys("scout", 0.25).limit(1, 61)  # of two ways to compute the same
    assert (scout(ids[:, 60:], cache) - scout(ids)[:, 60:]).abs().max() < both * scout(ids).abs().max()


def test_a_device_that_is_given_the_next_step(scout: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is reported once its end was waited for, when the next one has been begun, with what it held itself."""
    told: list[str] = []

    class Told:
        begun = 0

        def __init__(self, device: torch.device) -> None:
            self.number = Told.begun
            Told.begun += 1
            told.append(f"begun {self.number}")

        def wait(self) -> None:
            told.append(f"waited {self.number}")

    ids = tokens(30)
    straight = list(prefill(scout, new_cache(scout, ids), ids[0].tolist(), prefill_chunk_size=CHUNK))
    monkeypatch.setitem(l4ctx.engine.prefill.STEPS_AHEAD, "cpu", 1)
    monkeypatch.setattr(l4ctx.engine.prefill, "Milestone", Told)
    cache, steps = new_cache(scout, ids), []
    for step in prefill(scout, cache, ids[0].tolist(), prefill_chunk_size=CHUNK):
        told.append(f"reported {len(steps)}")
        steps.append(step)
    assert [(step.step, step.done, step.held) for step in steps] == [
        (step.step, step.done, step.held) for step in straight
    ]
    assert 0 < sum(step.step_seconds for step in steps) <= steps[-1].seconds
    last = len(steps) - 1
    expected = ["begun 0"]
    for number in range(last + 1):
        expected += [f"begun {number + 1}"] if number < last else []
        expected += [f"waited {number}", f"reported {number}"]
    assert told == expected and cache.offset == 30


def test_nothing_to_read(scout: Transformer) -> None:
    cache = new_cache(scout, tokens(3))
    assert list(prefill(scout, cache, [])) == list(prefill(scout, cache, array("i"))) == []
    assert cache.offset == 0


def test_it_reads_only_as_far_as_it_is_asked(scout: Transformer) -> None:
    ids = tokens(30)
    cache = new_cache(scout, ids)
    steps = prefill(scout, cache, ids[0].tolist(), prefill_chunk_size=CHUNK)
    assert cache.offset == 0
    assert [next(steps).done, next(steps).done, cache.offset] == [7, 14, 14]
    steps.close()
    assert cache.offset == 14
    with failing(scout, 6):
        next(prefill(scout, cache, ids[0, 14:].tolist(), prefill_chunk_size=CHUNK))
    assert cache.offset == 14


@pytest.mark.parametrize("make", [list, tuple, lambda ids: array("i", ids)])
def test_ids_of_every_kind(scout: Transformer, make: Callable[[list[int]], Sequence[int]]) -> None:
    ids = tokens(20)
    given = make(ids[0].tolist())
    batch = as_batch(given, torch.device("cpu"))
    assert batch.dtype == torch.int64 and torch.equal(batch, ids)
    batch.zero_()  # the caller's ids are the caller's
    assert list(given) == ids[0].tolist()
    assert [state.done for state in prefill(scout, new_cache(scout, ids), given)] == [20]


def test_the_default_is_a_whole_chunk_of_the_released_models() -> None:
    assert DEFAULT_PREFILL_CHUNK_SIZE == 8192


@pytest.mark.parametrize("name", ["scout", "maverick", "nope_only_last", "nope_first"])
def test_of_the_last_layer_only_keys_and_values_are_computed(toys: Toys, name: str) -> None:
    model = load_checkpoint(toys(name, 0.25).folder, dtype=torch.float32)
    rows: dict[str, int] = {}

    def count(module_name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
            rows[module_name] = rows.get(module_name, 0) + inputs[0].numel() // inputs[0].shape[-1]

        return hook

    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count(module_name))
    list(prefill(model, new_cache(model, tokens(40)), tokens(40)[0].tolist(), prefill_chunk_size=16))
    last = model.config.num_hidden_layers - 1
    of_last = {name.split(".", 3)[3]: number for name, number in rows.items() if f"layers.{last}." in name}
    assert of_last == {"self_attn.k_proj": 40, "self_attn.v_proj": 40}
    others = {number for name, number in rows.items() if f"layers.{last}." not in name}
    assert others == {40} and "lm_head" not in rows


@pytest.mark.parametrize("name", ["scout", "maverick", "top_3", "nope_first", "moe_none", "moe_listed"])
@pytest.mark.parametrize("size", [5, 16])
def test_operations_equal_the_closed_form(toys: Toys, name: str, size: int) -> None:
    """The products that PyTorch's own counter sees are those of `reading_operations`, for every part of a run."""
    model = load_checkpoint(toys(name, 0.25).folder, dtype=torch.float32)
    ids = tokens(60)
    cache = new_cache(model, ids)
    for start, stop in ((0, 33), (33, 60)):
        with FlopCounterMode(display=False) as counter:
            list(prefill(model, cache, ids[0, start:stop].tolist(), prefill_chunk_size=size))
        counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
        assert counts["aten.mm"] == reading_operations(model.config, start, stop).linear
        assert not {"aten.addmm", "aten.bmm"} & set(counts)


@pytest.mark.parametrize("size", [5, 3 * CHUNK])
def test_what_is_held_during_a_step_does_not_grow_with_the_length(toys: Toys, size: int) -> None:
    """Beside the cache: the peak of storages, and the largest one, over some 40 steps and over the first 4.

    One token over and over, so that routing is the same everywhere.
    """
    model = load_checkpoint(toys("maverick", 0.02).folder, dtype=torch.float32)
    length = 40 * max(size, CHUNK)
    cache = HybridKVCache(model.config, length=length)  # one block: it is there after the first token
    list(prefill(model, cache, [3]))
    peaks, largest = [], []
    for stop in (length // 10, length):
        with LiveStorages() as live:
            list(prefill(model, cache, [3] * (stop - cache.offset), prefill_chunk_size=size))
        peaks.append(live.peak)
        largest.append(live.largest)
    store = length * 2 * 10 * 4  # keys alone of one NoPE layer: what one copy of them would add
    assert peaks[1] - peaks[0] < store / 10 and largest[1] - largest[0] < store / 10
    assert peaks[0] < store  # or the line above would say nothing


def test_the_layer_that_computes(toys: Toys) -> None:
    """As a step goes through the layers, they are counted and told on."""
    told: list[tuple[str, int, int, int]] = []

    class Other:
        def entering(self, layer: int, tokens: int) -> None:
            told.append(("entering", layer, tokens, count.layer))

        def leaving(self, layer: int, tokens: int) -> None:
            told.append(("leaving", layer, tokens, count.layer))

    model, ids = load_checkpoint(toys("scout", 0.25).folder, dtype=torch.float32), tokens(12)
    count = LayerCount(Other())
    model.watcher = count
    last = model.config.num_hidden_layers - 1
    for step in prefill(model, new_cache(model, ids), ids[0].tolist(), prefill_chunk_size=5):
        assert count.layer == last
        size, both = len(step.step), ("entering", "leaving")
        expected = [(what, layer, size, layer) for layer in range(last + 1) for what in both]
        assert told == expected
        told.clear()
