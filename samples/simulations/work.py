"""What one rank of a mesh has to do in a prefill step: operations, and bytes that it sends. Counted token by token
and piece by piece from the model's shape, without the formulas of `l4ctx.planning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from model.config import TextConfig
from model.context_division import ContextRank, Piece

FLOAT32 = 4


@dataclass(frozen=True)
class Held:
    """Older keys and values of one context rank in one NoPE layer: tokens by tier, and how they are stored."""

    disk: int
    host: int
    device: int
    segment_tokens: int
    segment_bytes: int

    @property
    def tokens(self) -> int:
        return self.disk + self.host + self.device

    @property
    def segments(self) -> list[tuple[int, bool]]:
        """Tokens of those that are not on the GPU, oldest first, and whether they are on disk alone."""
        return [
            (min(self.segment_tokens, tokens - start), on_disk)
            for tokens, on_disk in ((self.disk, True), (self.host, False))
            for start in range(0, tokens, self.segment_tokens)
        ]


@dataclass(frozen=True)
class Step:
    """What is computed: positions of the text, by a model whose shape is one tensor rank's."""

    config: TextConfig
    itemsize: int
    positions: range
    tensor: int
    held: Sequence[Held]  # of each context rank
    weights: Sequence[int]  # bytes of each layer that are copied from host memory
    weights_on_disk: bool = False  # and read from disk before

    @property
    def context(self) -> int:
        return len(self.held)

    @property
    def pieces(self) -> list[Piece]:
        return list(ContextRank(0, self.context).pieces(self.positions, self.config.attention_chunk_size))

    def keys_seen(self, rank: int) -> int:
        """How many of a rank's keys the queries of other ranks see: those before the last piece of another one."""
        others = [piece.positions.start for piece in self.pieces if piece.owner != rank]
        if not others:
            return 0
        new = (piece.positions for piece in self.pieces if piece.owner == rank)
        return self.held[rank].tokens + sum(len(piece) for piece in new if piece.start < others[-1])

    @cached_property
    def queries_travel(self) -> bool:
        """Whether queries and what comes back for them are smaller than keys and values, over all ranks."""
        if self.context == 1:
            return False
        heads, dim = self.config.num_attention_heads, self.config.head_dim
        there_and_back = heads * (dim * self.itemsize + (dim + 1) * FLOAT32)
        keys = sum(self.keys_seen(rank) for rank in range(self.context))
        return len(self.positions) * there_and_back < keys * self.a_key

    @property
    def a_key(self) -> int:
        """Bytes of a key and a value, of all heads of a rank."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim * self.itemsize


@dataclass(frozen=True)
class RankWork:
    """One context rank's part of a step. Operations count a multiply-add as two."""

    step: Step
    rank: int

    @cached_property
    def own(self) -> list[range]:
        return [piece.positions for piece in self.step.pieces if piece.owner == self.rank]

    @cached_property
    def tokens(self) -> int:
        return sum(map(len, self.own))

    @property
    def keys_values(self) -> int:
        c, kv = self.step.config.hidden_size, self.step.config.num_key_value_heads * self.step.config.head_dim
        return 2 * self.tokens * c * 2 * kv

    @property
    def queries_and_output(self) -> int:
        return 2 * self.tokens * self.step.config.hidden_size * 2 * self._q

    def feed_forward(self, layer: int) -> int:
        """The router, a token's experts and the shared one, or a dense layer."""
        config = self.step.config
        if not config.is_moe(layer):
            return 2 * self.tokens * 3 * config.hidden_size * config.intermediate_size_mlp
        experts = (config.num_experts_per_tok + 1) * 3 * config.intermediate_size
        return 2 * self.tokens * config.hidden_size * (config.num_local_experts + experts)

    @cached_property
    def in_chunks(self) -> int:
        """Of attention in a RoPE layer: a query sees its own attention chunk up to itself."""
        size = self.step.config.attention_chunk_size
        return self._a_pair * sum(
            _sum_of(range(max(piece.start, start) - start + 1, min(piece.stop, start + size) - start + 1))
            for piece in self.own
            for start in range(piece.start - piece.start % size, piece.stop, size)
        )

    def to_older(self, keys: int) -> int:
        """Of attention to older keys of this rank."""
        queries = len(self.step.positions) if self.step.queries_travel else self.tokens
        return self._a_pair * queries * keys

    @cached_property
    def to_the_rest(self) -> int:
        """Of attention to what is on the GPU or has come from other ranks, the step's own keys included."""
        positions, held = self.step.positions, self.step.held[self.rank]
        if self.step.queries_travel:  # every query of the step with this rank's keys
            new = sum(_sum_of(range(positions.stop - p.stop + 1, positions.stop - p.start + 1)) for p in self.own)
            return self.to_older(held.device) + self._a_pair * new
        before = positions.start - 1
        new = sum(_sum_of(range(piece.start - before, piece.stop - before)) for piece in self.own)
        return self.to_older(positions.start - held.disk - held.host) + self._a_pair * new

    @property
    def sum_bytes(self) -> int:
        return self.tokens * self.step.config.hidden_size * FLOAT32

    @property
    def sent_before(self) -> int:
        """Bytes to each other context rank before attention: queries, or keys and values."""
        if self.step.queries_travel:
            return self.tokens * self._q * self.step.itemsize
        return self.step.keys_seen(self.rank) * self.step.a_key

    def sent_back(self, to: RankWork) -> int:
        """Bytes of outputs and log-sum-exps for the queries of another rank."""
        return to.tokens * (self._q + self.step.config.num_attention_heads) * FLOAT32

    @property
    def _q(self) -> int:
        return self.step.config.num_attention_heads * self.step.config.head_dim

    @property
    def _a_pair(self) -> int:
        """One query and one key in all heads: two products of head_dim multiply-adds."""
        return 4 * self._q


def _sum_of(numbers: range) -> int:
    return len(numbers) * (numbers.start + numbers.stop - 1) // 2
