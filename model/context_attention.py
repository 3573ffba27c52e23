"""Attention of NoPE layers where context ranks meet: queries travel to all keys and partial results return, or keys and
values travel, whichever is less (see `model.context_division`).

Chunks are whole, so what one rank's queries see of another rank's keys is always a number of its first ones. Within a
rank tokens are numbered as its own cache does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.attention import Attention, KVCache, Step
from model.config import TextConfig
from model.context_division import ContextRank, Exchanged, Piece, exchanged
from model.kernels.attend import AttentionState, Backend, KVSegment, attention_state, merge


class ContextExchange(Protocol):
    """What context ranks tell one another; every rank calls the same in the same order."""

    rank: ContextRank

    def from_rank(self, x: Tensor, number: int) -> Tensor:
        """x of rank `number`, on every rank; elsewhere x, of the same shape, is overwritten."""
        ...

    def returned(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sends parts[i] to rank i -> what each rank sent here, in shapes like parts[own number]; all of one dtype."""
        ...


class ContextCache(Protocol):
    """The cache of a whole sequence, of which `own` holds this rank's tokens: `cache.context.ContextKVCache`."""

    offset: int
    length: int

    @property
    def own(self) -> KVCache: ...

    @property
    def segment_tokens(self) -> int:
        """The same on every rank."""
        ...

    def advance(self, num_tokens: int) -> None: ...


class ContextFork(ContextCache, Protocol):
    """A continuation of a cache that others continue, too: `cache.context.ForkedContextCache`."""

    own_start: int  # how many of the tokens that they share are this rank's


@dataclass
class Meeting:
    """What the NoPE layers of one forward need to know of all ranks."""

    exchange: ContextExchange
    config: TextConfig  # of this tensor rank
    cache: KVCache  # own tokens
    segment_tokens: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    forks: Sequence[ContextFork] = ()  # of several sequences, that share the tokens before their own

    def empty(self, heads: int, tokens: int) -> Tensor:
        return torch.empty(self.batch, heads, tokens, self.config.head_dim, dtype=self.dtype, device=self.device)

    @property
    def rank(self) -> ContextRank:
        return self.exchange.rank

    def exchanged(self, pieces: Sequence[Piece]) -> Exchanged:
        return exchanged(self.config, self.rank.count, pieces, self.dtype.itemsize)

    def all_queries(self, q: Tensor | None, counts: Sequence[int]) -> Tensor:
        """Every rank's queries (B, H, T_i, D), of which there are `counts`, one behind the other."""
        queries = []
        for number, tokens in enumerate(counts):
            if tokens:
                given = self.empty(self.config.num_attention_heads, tokens) if number != self.rank.number else q
                assert given is not None
                queries.append(self.exchange.from_rank(given, number))
        return queries[0] if len(queries) == 1 else torch.cat(queries, 2)

    def own_results(self, state: AttentionState, counts: Sequence[int]) -> AttentionState | None:
        """From what each rank found for all queries, what all of them found for this rank's; None if it has none."""
        parts = torch.cat([state.out, state.lse[..., None]], -1).split(list(counts), 2)
        found = [AttentionState(x[..., :-1], x[..., -1]) for x in self.exchange.returned(parts)]
        return merged(found) if counts[self.rank.number] else None


def tokens_of_ranks(count: int, pieces: Sequence[Piece]) -> list[int]:
    """How many of these tokens each rank owns."""
    return [sum(len(piece.positions) for piece in pieces if piece.owner == number) for number in range(count)]


def nothing_seen(q: Tensor) -> AttentionState:
    """Of queries (B, H, T, D) that see no key."""
    return AttentionState(torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:3], -torch.inf).float())


def merged(states: Sequence[AttentionState]) -> AttentionState:
    total, *others = states
    for other in others:
        total = merge(total, other)
    return total


def merge_into(state: AttentionState, rows: slice, part: AttentionState) -> None:
    """Adds to what these queries have seen."""
    found = merge(AttentionState(state.out[:, :, rows], state.lse[:, :, rows]), part)
    state.out[:, :, rows], state.lse[:, :, rows] = found.out, found.lse


class Visit(NamedTuple):
    """Some of the queries, and what they see of a rank's keys."""

    rows: slice  # of the queries
    positions: range  # in that rank's numbers: their own ones, or for another rank's queries any behind what they see
    since: int  # they all see the keys before this
    stop: int  # and none from here on


class ContextAttention(Attention):
    """The attention of a NoPE layer, for own queries and on behalf of other ranks."""

    meeting: Meeting
    rows: Sequence[Sequence[Piece]] = ()  # the tokens of all ranks whose queries this layer computes, by sequence

    def store(self, keys: Tensor, values: Tensor, step: Step) -> None:
        super().store(keys, values, step)
        if not step.num_queries:
            self.serve()

    def serve(self) -> None:
        """What `attended` does on a rank that has no queries."""
        if any(self.rows):
            self._met(None, range(0))

    def attended(self, q: Tensor, step: Step, new: KVSegment) -> Tensor:
        state = self._met(q, step.parts[0].queries)
        assert state is not None
        return state.out.to(q.dtype)

    @property
    def pieces(self) -> Sequence[Piece]:
        """Of a single sequence."""
        (pieces,) = self.rows
        return pieces

    def _met(self, q: Tensor | None, own: range) -> AttentionState | None:
        if self.meeting.forks:
            return self._by_forks(q)
        if self.meeting.exchanged(self.pieces).are_queries:
            return self._by_queries(q, own)
        return self._by_keys(q, own)

    def _by_queries(self, q: Tensor | None, own: range) -> AttentionState | None:
        """Every rank attends all queries over its own keys, each of which is read once."""
        meeting, rank = self.meeting, self.meeting.rank
        counts = tokens_of_ranks(rank.count, self.pieces)
        joined, visits, start = meeting.all_queries(q, counts), list[Visit](), 0
        for number, tokens in enumerate(counts):
            if number != rank.number:
                visits += self._visits(rank, start, number)
            elif tokens:
                visits.append(self._own_visit(slice(start, start + tokens), own))
            start += tokens
        stop = max(visit.stop for visit in visits)
        segments = meeting.cache.segments(self.layer, range(start), range(stop)) if stop else ()
        return meeting.own_results(self._visited(joined, visits, segments), counts)

    def _by_keys(self, q: Tensor | None, own: range) -> AttentionState | None:
        """Every rank attends its own queries, first over its own keys, then over those that it gets."""
        meeting, rank = self.meeting, self.meeting.rank
        total = None
        if q is not None:
            segments = meeting.cache.segments(self.layer, own, range(own.stop))
            total = attention_state(q, own, segments, self.mask, meeting.backend)
        for number in range(rank.count):
            holder = ContextRank(number, rank.count)
            keys = holder.keys_seen(self.pieces, meeting.config.attention_chunk_size)
            segments = self._sent(keys) if number == rank.number else self._received(number, keys)
            if number == rank.number or q is None:
                for _ in segments:
                    pass
            elif keys:
                assert total is not None
                seen = self._visited(q, list(self._visits(holder, 0, rank.number)), segments)
                total = merge(total, seen)  # one by one, so that no more than two are held
        return total

    def _by_forks(self, q: Tensor | None) -> AttentionState | None:
        """Every rank attends the queries of all sequences over its own keys: once over those that they share, all of
        which they see, then each over those of its own sequence."""
        meeting, rank, forks = self.meeting, self.meeting.rank, self.meeting.forks
        size, shared = meeting.config.attention_chunk_size, forks[0].own_start
        counts = tokens_of_ranks(rank.count, [piece for row in self.rows for piece in row])
        joined, start = meeting.all_queries(q, counts), 0
        state = nothing_seen(joined)
        if shared:
            later = range(shared, shared + joined.shape[2])
            segments = forks[0].own.segments(self.layer, later, range(shared))
            found = attention_state(joined, later, segments, self.mask, meeting.backend)
            state = AttentionState(found.out.float(), found.lse)
        pieces = [(fork, piece) for fork, row in zip(forks, self.rows, strict=True) for piece in row]
        for fork, piece in sorted(pieces, key=lambda pair: pair[1].owner):  # in the order of `joined`
            here, start = slice(start, start + len(piece.positions)), start + len(piece.positions)
            seen = rank.tokens_before(piece.positions.start, size)
            positions = range(seen, seen + len(piece.positions))
            stop = positions.stop if piece.owner == rank.number else seen
            if stop > shared:
                segments = fork.own.segments(self.layer, positions, range(shared, stop))
                keys = (segment.within(range(stop)) for segment in segments if segment.start < stop)
                merge_into(
                    state, here, attention_state(joined[:, :, here], positions, keys, self.mask, meeting.backend)
                )
        return meeting.own_results(state, counts)

    def _sent(self, keys: int) -> Iterator[KVSegment]:
        meeting = self.meeting
        if keys:
            for segment in meeting.cache.segments(self.layer, range(1), range(keys)):
                plain = segment.plain
                for x in (plain.keys, plain.values):
                    meeting.exchange.from_rank(
                        x.expand(meeting.batch, -1, -1, -1).to(meeting.device), meeting.rank.number
                    )
                yield plain

    def _received(self, number: int, keys: int) -> Iterator[KVSegment]:
        meeting, heads = self.meeting, self.meeting.config.num_key_value_heads
        for start in range(0, keys, meeting.segment_tokens):
            tokens = min(meeting.segment_tokens, keys - start)
            k, v = (meeting.exchange.from_rank(meeting.empty(heads, tokens), number) for _ in range(2))
            yield KVSegment(k, v, start)

    def _visits(self, holder: ContextRank, start: int, owner: int) -> Iterator[Visit]:
        """What the queries of another rank see of the holder's keys; the first of them is at `start`."""
        for piece in self.pieces:
            if piece.owner == owner:
                seen = holder.tokens_before(piece.positions.start, self.meeting.config.attention_chunk_size)
                stop = start + len(piece.positions)
                yield Visit(slice(start, stop), range(seen, seen + len(piece.positions)), seen, seen)
                start = stop

    def _own_visit(self, rows: slice, own: range) -> Visit:
        """Keys are divided where the attention chunk begins, so that a draft's tokens get what each would alone."""
        return Visit(rows, own, own.start - own.start % self.meeting.config.attention_chunk_size, own.stop)

    def _visited(self, q: Tensor, visits: Sequence[Visit], segments: Iterable[KVSegment]) -> AttentionState:
        """Queries (B, H, T, D) -> attention to these keys, each of which is read once, with an output in float32."""
        since, backend, newer = min(visit.since for visit in visits), self.meeting.backend, list[KVSegment]()
        older = _before(segments, since, newer)
        if since:
            state = attention_state(q, range(since, since + q.shape[2]), older, self.mask, backend)
            state = AttentionState(state.out.float(), state.lse)
        else:
            for _ in older:
                pass
            state = nothing_seen(q)
        for rows, positions, _, stop in visits:
            here = [segment.within(range(stop)) for segment in newer if segment.start < stop]
            if here:
                part = attention_state(q[:, :, rows], positions, here, self.mask, backend)
                merge_into(state, rows, part)
        return state


def _before(segments: Iterable[KVSegment], stop: int, newer: list[KVSegment]) -> Iterator[KVSegment]:
    """The keys before position `stop`; what lies behind, which no sealed segment does, goes into `newer`."""
    for segment in segments:
        if segment.start < stop:
            yield segment.within(range(stop))
        if segment.positions.stop > stop:
            newer.append(segment.since(stop))
