"""Attention masks of Llama 4: a predicate, its tiles, and its block mask, all in closed form.

`mask_mod(b, h, q_idx, kv_idx)` follows the convention of torch.nn.attention.flex_attention. For fused kernels the same
mask decomposes into tiles: rectangles in which every query sees every key (`full`), and squares in which each query
sees the keys up to its own position (`causal_square`). Causal attention over aligned chunks decomposes into these two
exactly, so no kernel needs a materialised mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from model.transfers import to_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Tile(NamedTuple):
    """A part of the mask in which every query sees at least one key. Positions are absolute.

    `queries` and `keys` consist of `batch` equal, consecutive pieces; the i-th piece of queries sees only the i-th
    piece of keys. Tiles of equal shape are batched, so that one kernel call computes them.
    """

    kind: Literal["full", "causal_square"]
    queries: range
    keys: range
    batch: int = 1


@dataclass(frozen=True)
class AttentionMask:
    """Causal attention: over all keys (`chunk_size` None, NoPE layers) or within aligned chunks (RoPE layers)."""

    chunk_size: int | None = None

    def mask_mod(self, b: Tensor | int, h: Tensor | int, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether the query at absolute position `q_idx` sees the key at `kv_idx`; the same for all rows and heads."""
        causal = q_idx >= kv_idx
        if self.chunk_size is None:
            return causal
        return causal & (q_idx // self.chunk_size == kv_idx // self.chunk_size)

    def tiles(self, queries: range, keys: range) -> list[Tile]:
        """The visible part of `queries` x `keys` as a list of bounded length, whatever the size of the ranges."""
        if self.chunk_size is None:
            return _causal_tiles(queries, keys)
        size = self.chunk_size
        both = range(max(queries.start, keys.start), min(queries.stop, keys.stop))
        first_whole, last_whole = -(-both.start // size), both.stop // size
        batched = last_whole - first_whole >= 2
        whole = range(first_whole * size, last_whole * size) if batched else range(0)
        tiles = []
        for chunk in _chunks_outside(queries, keys, whole, size):
            tiles += _causal_tiles(_intersect(queries, chunk), _intersect(keys, chunk))
        if whole:
            tiles.append(Tile("causal_square", whole, whole, len(whole) // size))
        return sorted(tiles, key=lambda tile: (tile.queries.start, tile.keys.start))

    def first_seen(self, queries: range) -> int | None:
        """The position of the first key that each of the queries sees; None: they do not see the same first key."""
        if self.chunk_size is None:
            return 0
        chunk = queries.start // self.chunk_size
        return chunk * self.chunk_size if (queries.stop - 1) // self.chunk_size == chunk else None

    def block_mask(self, queries: range, keys: range, block_size: tuple[int, int], device: torch.device) -> BlockMask:
        """flex_attention's block mask over `queries` x `keys` in closed form, with indices relative to their starts.

        Its lists have an entry for every (query block, key block) pair, visible or not. Neither range may be empty or
        reach 2**31.
        """
        from torch.nn.attention.flex_attention import BlockMask  # here: it imports the compiler, half a second

        q_block, kv_block = block_size
        q_first = queries.start + q_block * torch.arange(-(-len(queries) // q_block))[:, None]
        k_first = keys.start + kv_block * torch.arange(-(-len(keys) // kv_block))
        q_last, k_last = q_first + q_block - 1, k_first + kv_block - 1
        inside = (q_last < queries.stop) & (k_last < keys.stop)
        q_end, k_end = q_last.clamp(max=queries.stop - 1), k_last.clamp(max=keys.stop - 1)
        some, every = q_end >= k_first, q_first >= k_last
        if self.chunk_size is not None:
            size = self.chunk_size
            q_chunks, k_chunks = (q_first // size, q_end // size), (k_first // size, k_end // size)
            some = _overlap_in_chunk(q_chunks, k_chunks, q_end, k_first, size)
            every &= (q_chunks[0] == k_chunks[1]) & (q_chunks[1] == k_chunks[0])
        full = every & inside
        partial = some & ~full
        # tensors, not ints, which torch.compile may treat as constants and recompile for at every step
        q_start, k_start = (torch.full((), x.start, dtype=torch.int32, device=device) for x in (queries, keys))

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.mask_mod(b, h, q_idx + q_start, kv_idx + k_start)

        counts, indices, full_counts, full_indices = (
            to_device(x[None, None], device) for kind in (partial, full) for x in _listed(kind)
        )
        return BlockMask.from_kv_blocks(
            counts,
            indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
            seq_lengths=(len(queries), len(keys)),
        )

    def moved_back(self, queries: range, keys: range) -> tuple[range, range]:
        """Shifts both ranges to small positions with the same mask, so that a cached block mask can be reused.

        Without chunks, keys that every query sees have the same mask, however old they are.
        """
        first = min(queries.start, keys.start)
        moved = first if self.chunk_size is None else first // self.chunk_size * self.chunk_size
        q_start, k_start = queries.start - moved, keys.start - moved
        if self.chunk_size is None:
            q_start = min(q_start, k_start + len(keys))
        return range(q_start, q_start + len(queries)), range(k_start, k_start + len(keys))


def _causal_tiles(queries: range, keys: range) -> list[Tile]:
    """At most three tiles: all queries with older keys, a causal square, later queries with the square's keys.

    For a single query, its own key counts as one of the older ones.
    """
    tiles = []
    older = range(keys.start, min(keys.stop, queries.start + (len(queries) == 1)))
    if queries and older:
        tiles.append(Tile("full", queries, older))
    square = range(max(queries.start, keys.start, older.stop), min(queries.stop, keys.stop))
    if square:
        tiles.append(Tile("causal_square", square, square))
        later = range(square.stop, queries.stop)
        if later:
            tiles.append(Tile("full", later, square))
    return tiles


def _intersect(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _chunks_outside(queries: range, keys: range, whole: range, size: int) -> list[range]:
    """Chunks that both ranges can share, except those inside `whole`: at most four."""
    first = max(queries.start, keys.start) // size
    last = (min(queries.stop, keys.stop + size - 1) - 1) // size  # queries may follow the keys within their chunk
    numbers = range(first, last + 1)
    if whole:
        numbers_before, numbers_after = range(first, whole.start // size), range(whole.stop // size, last + 1)
        return [range(n * size, (n + 1) * size) for n in (*numbers_before, *numbers_after)]
    return [range(n * size, (n + 1) * size) for n in numbers]


def _overlap_in_chunk(
    q_chunks: tuple[Tensor, Tensor], k_chunks: tuple[Tensor, Tensor], q_end: Tensor, k_first: Tensor, size: int
) -> Tensor:
    """Whether a query block and a key block contain a visible pair, given the first and last chunk of each.

    Compares the latest query with the earliest key in the last chunk that both touch and in the one before it: if any
    chunk has a visible pair, one of these two has.
    """
    visible = torch.zeros_like(q_end >= k_first)
    last_common = torch.minimum(q_chunks[1], k_chunks[1])
    for chunk in (last_common, last_common - 1):
        common = (chunk >= q_chunks[0]) & (chunk >= k_chunks[0])
        latest_query = torch.minimum(q_end, chunk * size + size - 1)
        earliest_key = torch.maximum(k_first, chunk * size)
        visible |= common & (latest_query >= earliest_key)
    return visible


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Flags (rows, columns) in flex_attention's format: a count per row, and column indices with the set ones first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()
