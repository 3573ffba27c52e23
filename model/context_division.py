"""How a sequence is divided over ranks: context parallelism in closed form.

Attention chunks are dealt out whole, so that the window of a RoPE layer is one rank's, and only NoPE layers exchange
anything. Of 2 * count consecutive chunks, rank i owns the i-th from either end: then causal attention is the same work
for all. A rank numbers its own tokens in their order: a multiple of the attention chunk is one there, too. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.config import TextConfig

PARTIAL_ITEMSIZE = 4
"""Bytes an element of partial outputs and log-sum-exps, which are float32."""


class Piece(NamedTuple):
    """Consecutive tokens of one rank, at absolute positions."""

    owner: int
    positions: range


@dataclass(frozen=True)
class ContextRank:
    """One of the ranks that share a sequence. In a mesh of tensor and context ranks this is the outer axis."""

    number: int
    count: int

    def owner(self, chunk: int) -> int:
        """The rank that owns attention chunk number `chunk`."""
        place = chunk % (2 * self.count)
        return min(place, 2 * self.count - 1 - place)

    def tokens_before(self, position: int, chunk_size: int) -> int:
        """How many of the tokens before `position` are this rank's: what its own numbering makes of it."""
        chunk, rest = divmod(position, chunk_size)
        periods, place = divmod(chunk, 2 * self.count)
        chunks = 2 * periods + (place > self.number) + (place > 2 * self.count - 1 - self.number)
        return chunks * chunk_size + (rest if self.owner(chunk) == self.number else 0)

    def own_length(self, length: int, chunk_size: int) -> int:
        """The length of this rank's own cache in a run of `length` tokens; there is none of no tokens."""
        return max(1, self.tokens_before(length, chunk_size))

    def positions(self, own: range, chunk_size: int) -> Iterator[range]:
        """Where in the sequence the tokens are that this rank numbers so, cut at attention chunks: the inverse of
        `tokens_before`."""
        start = own.start
        while start < own.stop:
            number, rest = divmod(start, chunk_size)
            count = min(chunk_size - rest, own.stop - start)
            place = self.number if number % 2 == 0 else 2 * self.count - 1 - self.number
            position = (number // 2 * 2 * self.count + place) * chunk_size + rest
            yield range(position, position + count)
            start += count

    def pieces(self, positions: range, chunk_size: int) -> Iterator[Piece]:
        """The tokens at these positions, oldest first, cut where the owner changes."""
        start = position = positions.start
        while position < positions.stop:
            owner = self.owner(position // chunk_size)
            position = min(positions.stop, (position // chunk_size + 1) * chunk_size)
            if position == positions.stop or self.owner(position // chunk_size) != owner:
                yield Piece(owner, range(start, position))
                start = position

    def most_in_a_step(self, step: int, chunk_size: int) -> int:
        """The most tokens that one rank has of those that are read at a time, so many on an absolute grid."""
        if step < chunk_size:
            return step
        starts = range(0, 2 * self.count * step, step)
        ranks = [ContextRank(number, self.count) for number in range(self.count)]
        return max(
            rank.tokens_before(start + step, chunk_size) - rank.tokens_before(start, chunk_size)
            for start in starts
            for rank in ranks
        )

    def keys_seen(self, pieces: Sequence[Piece], chunk_size: int) -> int:
        """How many of this rank's keys the queries of other ranks see: its first ones, as chunks are whole."""
        others = [piece for piece in pieces if piece.owner != self.number]
        return self.tokens_before(others[-1].positions.start, chunk_size) if others else 0


def most_tokens(count: int, tokens: int, chunk_size: int) -> int:
    """The most of the first `tokens` that one of `count` ranks owns."""
    return max(ContextRank(number, count).tokens_before(tokens, chunk_size) for number in range(count))


def bytes_of_queries(config: TextConfig, queries: int, itemsize: int) -> int:
    """Bytes of so many queries on their way to one rank, and of their partial outputs and log-sum-exps on the way back.

    `config` is that of one tensor rank (`model.division.divided`), `itemsize` bytes per element of what is computed in.
    """
    heads = config.num_attention_heads
    return queries * heads * (config.head_dim * itemsize + (config.head_dim + 1) * PARTIAL_ITEMSIZE)


def bytes_of_keys(config: TextConfig, keys: int, itemsize: int) -> int:
    """Bytes of so many keys and values on their way to one rank."""
    return keys * 2 * config.num_key_value_heads * config.head_dim * itemsize


def most_queries(config: TextConfig, tokens: int, step: int, itemsize: int) -> int:
    """The most queries that travel in any step of up to `step` tokens within the first `tokens`: more of them would be
    more bytes than all keys and values before them, which would travel instead."""
    return min(step, bytes_of_keys(config, tokens, itemsize) // bytes_of_queries(config, 1, itemsize))


def meeting_bytes(config: TextConfig, tokens: int, itemsize: int) -> int:
    """Upper estimate of what a rank holds while it attends queries of all ranks, `tokens` in one row of a batch.

    The queries twice, while they are joined; five times their size in float32 where partial results are merged.
    """
    return tokens * config.num_attention_heads * config.head_dim * (2 * itemsize + 5 * PARTIAL_ITEMSIZE)


class Exchanged(NamedTuple):
    """What a NoPE layer exchanges in one forward."""

    are_queries: bool  # else keys and values
    num_bytes: int  # sent by all ranks together, in one row of a batch


def exchanged(config: TextConfig, count: int, pieces: Sequence[Piece], itemsize: int) -> Exchanged:
    """The smaller of two exchanges that let the queries of `pieces`, which `ContextRank.pieces` yields, see every key.

    Either they travel to all ranks and partial results return, or the keys and values that other ranks' queries see
    travel to all ranks.
    """
    ranks = [ContextRank(number, count) for number in range(count)]
    keys = sum(rank.keys_seen(pieces, config.attention_chunk_size) for rank in ranks)
    by_queries = bytes_of_queries(config, sum(len(piece.positions) for piece in pieces), itemsize)
    by_keys = bytes_of_keys(config, keys, itemsize)
    return Exchanged(by_queries < by_keys, (count - 1) * min(by_queries, by_keys))
