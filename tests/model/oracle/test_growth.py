"""Nothing grows with the length but what must: the work that reading takes, counted, equals the closed form.

Counted are the matrix products that PyTorch is asked for, the tiles that the attention backend is given, and calls. How
long a kernel takes for them is left to samples/benchmarks/benchmark_growth.py.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l4ctx.engine.prefill import prefill
from model.config import TextConfig
from model.costs import Operations, reading_operations
from model.kernels.attend import AttentionState, KVSegment
from model.kernels.masks import AttentionMask
from model.simd.products import FEW_ROWS
from model.transformer import Transformer
from model.weights.loading import load_checkpoint
from support.cached_paths import new_cache
from support.toy_checkpoints import CHUNK, VOCABULARY, Toys

LENGTH = 7 * CHUNK + 4
SIZES = (3, CHUNK, 2 * CHUNK, 5 * CHUNK + 1, 1000)  # prefill chunks: of a part of an attention chunk, several, all
KINDS = ("scout", "maverick", "top_2", "top_3", "nope_first", "nope_only_last", "moe_none", "one_kv_head", "biases")
BESIDE = ("nope_first", "top_2", "nope_only_last", "moe_none", "biases")  # only with -m matrix


class Products(TorchDispatchMode):
    """Counts operations dispatched, and the floating-point operations of matrix products among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.dispatched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with self:  # what is composed of other operations is looked into
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.dispatched += 1
        self.operations += product_operations(func.overloadpacket.__name__, [x for x in args if isinstance(x, Tensor)])
        return func(*args, **(kwargs or {}))


def product_operations(name: str, tensors: list[Tensor]) -> int:
    """2 for each multiply-add, of every operation that multiplies matrices or vectors."""
    if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"):
        left, right = tensors[-2:]
        return 2 * left.numel() * (right.shape[-1] if name in ("mm", "bmm", "addmm", "baddbmm") else 1)
    assert not any(word in name for word in ("matmul", "linear", "conv", "einsum", "addbmm", "addr", "_mm")), name
    return 0


@dataclass
class Work:
    """What a model was asked to compute since counting began. `linear` are all products outside of attention."""

    linear: int = 0
    chunked_attention: int = 0
    full_attention: int = 0
    dispatched: int = 0
    backend_calls: int = 0
    largest_number_of_tiles: int = 0
    pairs_by_predicate: int = 0
    pairs_by_tiles: int = 0

    @property
    def operations(self) -> Operations:
        return Operations(self.linear, self.chunked_attention, self.full_attention)

    def count_attention(self, queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask) -> None:
        """A pair of query and key is a product of queries with keys and one of weights with values, in every head."""
        tiles = mask.tiles(positions, segment.positions)
        pairs = 0
        for tile in tiles:
            height, width = len(tile.queries) // tile.batch, len(tile.keys) // tile.batch
            assert tile.kind == "full" or height == width
            pairs += tile.batch * (height * width if tile.kind == "full" else height * (height + 1) // 2)
        if mask.chunk_size is None:
            self.full_attention += 4 * queries.shape[1] * queries.shape[3] * pairs
        else:
            self.chunked_attention += 4 * queries.shape[1] * queries.shape[3] * pairs
        query, key = (torch.arange(where.start, where.stop) for where in (positions, segment.positions))
        self.pairs_by_predicate += int(mask.mask_mod(0, 0, query[:, None], key).sum())
        self.pairs_by_tiles += pairs
        self.backend_calls += 1
        self.largest_number_of_tiles = max(self.largest_number_of_tiles, len(tiles))


@contextmanager
def counting(model: Transformer) -> Iterator[Callable[[], Work]]:
    """Counts all that `model` computes within it: attention by what its backend is given, the rest by its products."""
    work, backend, products = Work(), model.backend, Products()

    def counted(
        queries: Tensor, positions: range, segment: KVSegment, mask: AttentionMask
    ) -> Iterator[tuple[range, AttentionState]]:
        before = products.operations, products.dispatched
        work.count_attention(queries, positions, segment, mask)
        products.dispatched = before[1]
        for part in backend(queries, positions, segment, mask):
            products.operations = before[0]  # the kernel's own
            yield part
            before = products.operations, products.dispatched
        products.operations = before[0]

    def so_far() -> Work:
        return replace(work, linear=products.operations, dispatched=products.dispatched)

    model.backend = counted
    try:
        with products:
            yield so_far
    finally:
        model.backend = backend


def random_ids(count: int) -> array[int]:
    return array("i", torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(2)).tolist())


@pytest.mark.parametrize(
    ("name", "block", "segment"),
    [
        *((name, 4, 2) for name in KINDS if name not in BESIDE),
        ("maverick", 1, 1),
        *(pytest.param(name, 4, 2, marks=pytest.mark.matrix) for name in BESIDE),
        pytest.param("nope_first", 2, 2, marks=pytest.mark.matrix),
    ],
)  # in attention chunks
def test_operations_equal_the_closed_form_after_every_step(toys: Toys, name: str, block: int, segment: int) -> None:
    model, ids = load_checkpoint(toys(name, 0.25).folder, dtype=torch.float32), random_ids(LENGTH)
    turn = KINDS.index(name)
    for size in SIZES if name in ("scout", "nope_first") else {SIZES[turn % 5], SIZES[(turn + 2) % 5]}:
        cache = new_cache(model, torch.zeros(1, LENGTH), block_chunks=block, segment_chunks=segment)
        with counting(model) as work:
            steps = 0
            for step in prefill(model, cache, ids, prefill_chunk_size=size):
                assert work().operations == reading_operations(model.config, 0, step.done), (size, step.done)
                steps += 1
            assert steps >= LENGTH // max(size, CHUNK * block) and step.done == LENGTH
        assert work().pairs_by_predicate == work().pairs_by_tiles > 0
        assert work().largest_number_of_tiles <= 5  # whatever the length


@pytest.mark.parametrize("name", ["maverick", "top_2", "nope_first"])
def test_operations_of_what_follows(toys: Toys, name: str) -> None:
    """A run that resumes somewhere does the remaining work and repeats nothing."""
    model, ids = load_checkpoint(toys(name, 0.25).folder, dtype=torch.float32), random_ids(LENGTH)
    cache = new_cache(model, torch.zeros(1, LENGTH))
    cuts = (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 1, 6 * CHUNK, LENGTH)
    for start, stop in itertools.pairwise(cuts):
        with counting(model) as work:
            list(prefill(model, cache, ids[start:stop], prefill_chunk_size=2 * CHUNK))
        assert work().operations == reading_operations(model.config, start, stop)


def test_the_closed_form_is_linear_and_quadratic_and_nothing_else() -> None:
    """Over equal steps of whole attention chunks third differences vanish, of linear parts the second ones too."""
    config = TextConfig.from_dict({"model_type": "llama4_text"})
    assert config.num_nope_layers == 12
    step = 5 * config.attention_chunk_size
    work = [reading_operations(config, 0, n * step) for n in range(8)]
    linear, chunked, full = (
        [getattr(part, name) for part in work] for name in ("linear", "chunked_attention", "full_attention")
    )
    assert set(differences(linear, 2)) == set(differences(chunked, 2)) == {0}
    assert set(differences(full, 3)) == {0} and min(differences(full, 2)) > 0
    assert [reading_operations(config, a * step, (a + 1) * step).total for a in range(7)] == differences(
        [part.total for part in work], 1
    )


def differences(values: list[int], order: int) -> list[int]:
    return values if order == 0 else differences([b - a for a, b in itertools.pairwise(values)], order - 1)


@contextmanager
def python_calls() -> Iterator[list[int]]:
    """Counts calls of this repository's functions, generators' resumptions included."""
    calls = [0]

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").split(".")[0] in ("l4ctx", "cache", "model"):
            calls[0] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def calls_by_step(model: Transformer, size: int, *, steps: int) -> list[tuple[int, int, int]]:
    """For each step of a run: calls of the attention backend, operations dispatched, calls of our own functions.

    One token over and over, so that routing is the same in every step. A block is two segments.
    """
    ids = array("i", [3]) * (steps * size)
    found, calls_found = [], []
    for is_profiled in (False, True):
        cache = new_cache(model, torch.zeros(1, len(ids)), block_chunks=2, segment_chunks=1)
        reading = prefill(model, cache, ids, prefill_chunk_size=size)
        for _ in range(steps):
            if is_profiled:
                with python_calls() as calls:
                    next(reading)
                calls_found.append(calls[0])
            else:
                with counting(model) as work:
                    next(reading)
                found.append((work().backend_calls, work().dispatched))
    return [(*counts, calls) for counts, calls in zip(found, calls_found, strict=True)]


@pytest.mark.parametrize("size", [CHUNK, 2 * CHUNK])
@pytest.mark.parametrize("name", ["scout", pytest.param("moe_none", marks=pytest.mark.matrix)])
def test_calls_of_a_step_grow_linearly_in_the_number_of_segments(toys: Toys, name: str, size: int) -> None:
    """Two steps, or one, fill a block: from one block to the next as many more calls each time."""
    model = load_checkpoint(toys(name, 0.02).folder, dtype=torch.float32)
    counts = calls_by_step(model, size, steps=16)
    blocks = [counts[n : n + 2] for n in range(4, 16, 2)]  # behind the first ones, in which things are made
    period = [tuple(sum(step[kind] for step in block) for kind in range(3)) for block in blocks]
    for kind, what in enumerate(("backend calls", "operations", "functions")):
        sums = [block[kind] for block in period]
        assert set(differences(sums, 2)) == {0}, (what, sums)
        assert differences(sums, 1)[0] > 0, what
    attended = sum(not flag for flag in model.config.no_rope_layers[:-1])
    segments = attended * size // CHUNK  # that each step adds, of the NoPE layers whose queries are computed
    if size <= FEW_ROWS:  # few queries are attended one by one
        segments *= size
    assert differences([step[0] for step in counts], 1)[4:] == [segments] * 11
