"""Masks in closed form against their predicate, element by element, on seeded random cases."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from model.kernels.masks import AttentionMask, Tile
from support.ranges import random_ranges

CHUNKS = (None, 1, 2, 3, 5, 7, 64)


def visible(chunk: int | None, queries: range, keys: range) -> Tensor:
    """The definition, in plain Python: causal, and within one aligned chunk."""
    seen = [[k <= q and (chunk is None or q // chunk == k // chunk) for k in keys] for q in queries]
    return torch.tensor(seen, dtype=torch.bool).view(len(queries), len(keys))


def pieces(tile: Tile) -> list[tuple[range, range]]:
    assert len(tile.queries) % tile.batch == 0 and len(tile.keys) % tile.batch == 0
    t, s = len(tile.queries) // tile.batch, len(tile.keys) // tile.batch
    return [(tile.queries[i * t : (i + 1) * t], tile.keys[i * s : (i + 1) * s]) for i in range(tile.batch)]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_predicate(chunk: int | None) -> None:
    generator = random.Random(0)
    for _ in range(50):
        queries, keys = random_ranges(generator)
        q_idx = torch.tensor(queries, dtype=torch.long)[:, None]
        k_idx = torch.tensor(keys, dtype=torch.long)
        assert torch.equal(AttentionMask(chunk).mask_mod(0, 0, q_idx, k_idx), visible(chunk, queries, keys))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_tiles_hold_each_visible_pair_once(chunk: int | None) -> None:
    generator = random.Random(1)
    for _ in range(300):
        queries, keys = random_ranges(generator)
        held = torch.zeros(len(queries), len(keys), dtype=torch.long)
        for tile in AttentionMask(chunk).tiles(queries, keys):
            assert tile.queries and tile.keys, "an empty tile kills the CPU kernel"
            for rows, columns in pieces(tile):
                assert rows.start >= queries.start and rows.stop <= queries.stop
                assert columns.start >= keys.start and columns.stop <= keys.stop
                shape = (len(rows), len(columns))
                if tile.kind == "causal_square":
                    assert shape[0] == shape[1], "the kernel's causal mask is right for squares only"
                    seen = torch.ones(shape, dtype=torch.long).tril()
                else:
                    seen = torch.ones(shape, dtype=torch.long)
                assert (seen.sum(1) > 0).all(), "a fully masked row has no log-sum-exp"
                held[
                    rows.start - queries.start : rows.stop - queries.start,
                    columns.start - keys.start : columns.stop - keys.start,
                ] += seen
        assert torch.equal(held, visible(chunk, queries, keys).long()), (queries, keys)


def test_tiles_stay_few_however_long_the_input() -> None:
    generator = random.Random(2)
    for chunk in (None, 7, 8192):
        for _ in range(300):
            stop = generator.randrange(1, 10_000_000)
            queries = range(generator.randrange(stop), stop)
            keys = range(generator.randrange(queries.stop), stop)
            assert len(AttentionMask(chunk).tiles(queries, keys)) <= 12


def test_equal_chunks_are_one_batch() -> None:
    tiles = AttentionMask(7).tiles(range(3, 45), range(45))
    assert tiles == [
        Tile("full", range(3, 7), range(3)),
        Tile("causal_square", range(3, 7), range(3, 7)),
        Tile("causal_square", range(7, 42), range(7, 42), 5),
        Tile("causal_square", range(42, 45), range(42, 45)),
    ]


@pytest.mark.parametrize("chunk", [None, 8192])
def test_one_new_token_at_ten_million(chunk: int | None) -> None:
    now = 10_000_000
    tiles = AttentionMask(chunk).tiles(range(now, now + 1), range(now + 1))
    first = 0 if chunk is None else now // chunk * chunk
    assert [(tile.kind, tile.keys) for tile in tiles] == [("full", range(first, now + 1))]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_block_mask_equals_torchs(chunk: int | None) -> None:
    """The lists of partial and of full blocks, as flex_attention reads them, equal those found element by element."""
    generator = random.Random(3)
    full_and_partial = 0
    for _ in range(80):
        queries, keys = random_ranges(generator)
        if not queries or not keys:
            continue
        far = generator.choice([0, 10_000_000])
        queries, keys = (range(x.start + far, x.stop + far) for x in (queries, keys))
        block_size = generator.choice([(2, 3), (4, 4), (5, 2), (1, 1), (16, 8), (3, 64), (64, 7), (128, 128)])
        mask = AttentionMask(chunk)
        got = mask.block_mask(queries, keys, block_size, torch.device("cpu"))
        expected = create_block_mask(
            lambda b, h, q, k, mask=mask, queries=queries, keys=keys: mask.mask_mod(
                b, h, q + queries.start, k + keys.start
            ),
            None,
            None,
            len(queries),
            len(keys),
            device="cpu",
            BLOCK_SIZE=block_size,
        )
        assert got.BLOCK_SIZE == expected.BLOCK_SIZE and got.seq_lengths == expected.seq_lengths
        assert torch.equal(got.to_dense(), expected.to_dense()), (queries, keys, block_size)
        for kind in ("kv", "full_kv"):
            counts = getattr(got, f"{kind}_num_blocks")
            assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks")), (queries, keys, block_size)
            for row, count in enumerate(counts[0, 0].tolist()):
                listed, wanted = (getattr(m, f"{kind}_indices")[0, 0, row, :count] for m in (got, expected))
                assert torch.equal(listed, wanted), (queries, keys, block_size)
        full_and_partial += int(got.kv_num_blocks.sum() > 0 and got.full_kv_num_blocks.sum() > 0)
        for kind in ("q", "full_q"):  # the transposed lists, read when gradients are wanted
            assert torch.equal(getattr(got, f"{kind}_num_blocks"), getattr(expected, f"{kind}_num_blocks"))
        q_idx, k_idx = torch.arange(len(queries))[:, None], torch.arange(len(keys))
        assert torch.equal(got.mask_mod(0, 0, q_idx, k_idx), visible(chunk, queries, keys))
    assert full_and_partial >= (5 if chunk is None or chunk > 3 else 0)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_moved_back_masks_are_the_same(chunk: int | None) -> None:
    generator = random.Random(4)
    for _ in range(200):
        queries, keys = random_ranges(generator)
        far = generator.choice([0, 10_000_000])
        queries, keys = (range(x.start + far, x.stop + far) for x in (queries, keys))
        moved = AttentionMask(chunk).moved_back(queries, keys)
        assert [len(x) for x in moved] == [len(queries), len(keys)]
        assert torch.equal(visible(chunk, *moved), visible(chunk, queries, keys)), (queries, keys)
        assert all(0 <= x.start < 100 + (chunk or 0) for x in moved)
    if chunk is None:
        for start in (0, 100, 9_999_900):  # what is wholly seen has one mask
            assert AttentionMask().moved_back(range(10_000_000, 10_000_005), range(start, start + 50)) == (
                range(50, 55),
                range(50),
            )
