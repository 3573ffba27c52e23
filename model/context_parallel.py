"""Context parallelism, applied from outside: each rank computes the attention chunks that it owns, and no other.

Embeddings, RoPE layers and feed-forward layers need no other rank. In NoPE layers the ranks meet: queries travel to all
keys and partial results return, or keys and values travel, whichever is less (see `model.context_division`). Chunks are
whole, so what one rank's queries see of another rank's keys is always a number of its first ones. Within a rank tokens
are numbered as its own cache does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.attention import Attention, KVCache, Part, Step, query_temperature
from model.config import TextConfig
from model.context_division import ContextRank, Exchanged, Piece, exchanged
from model.kernels.attend import AttentionState, Backend, KVSegment, attention_state, merge
from model.rope import phases
from model.transformer import Transformer, Wanted, wanted_tokens


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

    def empty(self, heads: int, tokens: int) -> Tensor:
        return torch.empty(self.batch, heads, tokens, self.config.head_dim, dtype=self.dtype, device=self.device)

    @property
    def rank(self) -> ContextRank:
        return self.exchange.rank

    def exchanged(self, pieces: Sequence[Piece]) -> Exchanged:
        return exchanged(self.config, self.rank.count, pieces, self.dtype.itemsize)


class Visit(NamedTuple):
    """Some of the queries, and what they see of a rank's keys."""

    rows: slice  # of the queries
    positions: range  # in that rank's numbers: their own ones, or for another rank's queries any behind what they see
    since: int  # they all see the keys before this
    stop: int  # and none from here on


class ContextAttention(Attention):
    """The attention of a NoPE layer, for own queries and on behalf of other ranks."""

    meeting: Meeting
    pieces: Sequence[Piece] = ()  # the tokens of all ranks whose queries this layer computes

    def store(self, keys: Tensor, values: Tensor, step: Step) -> None:
        super().store(keys, values, step)
        if not step.num_queries:
            self.serve()

    def serve(self) -> None:
        """What `attended` does on a rank that has no queries."""
        if self.pieces:
            self._met(None, range(0))

    def attended(self, q: Tensor, step: Step, new: KVSegment) -> Tensor:
        state = self._met(q, step.parts[0].queries)
        assert state is not None
        return state.out.to(q.dtype)

    def _met(self, q: Tensor | None, own: range) -> AttentionState | None:
        if self.meeting.exchanged(self.pieces).are_queries:
            return self._by_queries(q, own)
        return self._by_keys(q, own)

    def _by_queries(self, q: Tensor | None, own: range) -> AttentionState | None:
        """Every rank attends all queries over its own keys, each of which is read once."""
        meeting, rank = self.meeting, self.meeting.rank
        queries, visits, counts, start = list[Tensor](), list[Visit](), list[int](), 0
        for number in range(rank.count):
            tokens = sum(len(piece.positions) for piece in self.pieces if piece.owner == number)
            counts.append(tokens)
            if not tokens:
                continue
            given = meeting.empty(self.meeting.config.num_attention_heads, tokens) if number != rank.number else q
            assert given is not None
            queries.append(meeting.exchange.from_rank(given, number))
            if number == rank.number:
                visits.append(self._own_visit(slice(start, start + tokens), own))
            else:
                visits += self._visits(rank, start, number)
            start += tokens
        joined = queries[0] if len(queries) == 1 else torch.cat(queries, 2)
        stop = max(visit.stop for visit in visits)
        segments = meeting.cache.segments(self.layer, range(start), range(stop)) if stop else ()
        state = self._visited(joined, visits, segments)
        parts = torch.cat([state.out, state.lse[..., None]], -1).split(counts, 2)
        found = [AttentionState(x[..., :-1], x[..., -1]) for x in meeting.exchange.returned(parts)]
        return _merged(found) if q is not None else None

    def _by_keys(self, q: Tensor | None, own: range) -> AttentionState | None:
        """Every rank attends its own queries, first over its own keys, then over those that it gets."""
        meeting, rank = self.meeting, self.meeting.rank
        states = []
        if q is not None:
            segments = meeting.cache.segments(self.layer, own, range(own.stop))
            states.append(attention_state(q, own, segments, self.mask, meeting.backend))
        for number in range(rank.count):
            holder = ContextRank(number, rank.count)
            keys = holder.keys_seen(self.pieces, meeting.config.attention_chunk_size)
            segments = self._sent(keys) if number == rank.number else self._received(number, keys)
            if number == rank.number or q is None:
                for _ in segments:
                    pass
            elif keys:
                states.append(self._visited(q, list(self._visits(holder, 0, rank.number)), segments))
        return _merged(states) if states else None

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
            state = AttentionState(
                torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:3], -torch.inf).float()
            )
        for rows, positions, _, stop in visits:
            here = [segment.within(range(stop)) for segment in newer if segment.start < stop]
            if here:
                part = attention_state(q[:, :, rows], positions, here, self.mask, backend)
                merged = merge(AttentionState(state.out[:, :, rows], state.lse[:, :, rows]), part)
                state.out[:, :, rows], state.lse[:, :, rows] = merged.out, merged.lse
        return state


def _before(segments: Iterable[KVSegment], stop: int, newer: list[KVSegment]) -> Iterator[KVSegment]:
    """The keys before position `stop`; what lies behind, which no sealed segment does, goes into `newer`."""
    for segment in segments:
        if segment.start < stop:
            yield segment.within(range(stop))
        if segment.positions.stop > stop:
            newer.append(segment.since(stop))


def _merged(states: Sequence[AttentionState]) -> AttentionState:
    total, *others = states
    for other in others:
        total = merge(total, other)
    return total


class ContextTransformer(Transformer):
    """One context rank's model: all ranks call it with the same tokens, and get the same logits.

    `config` is that of one tensor rank. A forward needs a `ContextCache`.
    """

    def __init__(self, config: TextConfig, attention: str, exchange: ContextExchange) -> None:
        super().__init__(config, attention)
        self.exchange = exchange
        self._meeting_layers: list[ContextAttention] = []
        for number, layer in enumerate(self.model.layers):
            if not config.uses_rope(number):
                layer.self_attn = ContextAttention(config, number)
                self._meeting_layers.append(layer.self_attn)

    @torch.inference_mode()
    def forward(self, inputs: Tensor, cache: Any = None, logits: Wanted = "all", observer: Any = None) -> Tensor | None:
        """Token ids (B, T), or embeddings (B, T, C), of all ranks -> logits (B, T, V), (B, 1, V), or None."""
        assert cache is not None and observer is None, "context ranks need a cache, and cannot be observed"
        rank, size, start = self.exchange.rank, self.config.attention_chunk_size, cache.offset
        positions = range(start, start + inputs.shape[1])
        pieces = list(rank.pieces(positions, size))
        (count,) = wanted_tokens(logits, [len(positions)])
        wanted = list(rank.pieces(positions[len(positions) - count :], size))
        mine, own_wanted = (
            [piece.positions for piece in some if piece.owner == rank.number] for some in (pieces, wanted)
        )
        found = None
        with self._meeting(cache, inputs.shape[0], pieces, wanted):
            if mine:
                own = torch.cat([inputs[:, here.start - start : here.stop - start] for here in mine], 1)
                step = self._step(mine, cache)
                found = self._run(own, step, [sum(map(len, own_wanted))])
            else:
                for layer in self._meeting_layers:
                    layer.serve()
        cache.advance(len(positions))
        return self._told(found, wanted, inputs.shape[0]) if wanted else None

    def forward_ragged(self, *arguments: Any, **options: Any) -> list[Tensor] | None:
        raise NotImplementedError("context ranks compute one sequence at a time")

    @contextmanager
    def _meeting(self, cache: Any, batch: int, pieces: Sequence[Piece], wanted: Sequence[Piece]) -> Iterator[None]:
        """Lets NoPE layers know what this forward is about."""
        meeting = Meeting(
            self.exchange, self.config, cache.own, cache.segment_tokens, batch, self.dtype, self.device, self.backend
        )
        last = self.config.num_hidden_layers - 1
        try:
            for layer in self._meeting_layers:
                layer.meeting, layer.pieces = meeting, wanted if layer.layer == last else pieces
            yield
        finally:
            for layer in self._meeting_layers:
                del layer.meeting, layer.pieces

    def _step(self, mine: Sequence[range], cache: Any) -> Step:
        """Phases of rotary embedding are relative to the attention chunk; temperatures are of absolute positions."""
        first = self.exchange.rank.tokens_before(mine[0].start, self.config.attention_chunk_size)
        own = range(first, first + sum(map(len, mine)))
        rotation = phases(self.config, own.start, own.stop, max(cache.length, mine[-1].stop), self.device)
        known = [query_temperature(self.config, here, self.device) for here in mine]
        temperatures = [x for x in known if x is not None]
        return Step(
            (Part(own, own, 0, cache.own),),
            0,
            rotation,
            torch.cat(temperatures) if temperatures else None,
            self.backend,
        )

    def _told(self, found: Tensor | None, wanted: Sequence[Piece], batch: int) -> Tensor:
        """Logits (B, tokens, V) that are wanted, from their owners."""
        told, start = list[Tensor](), 0
        for owner, positions in wanted:
            if owner == self.exchange.rank.number:
                assert found is not None
                here, start = found[:, start : start + len(positions)], start + len(positions)
            else:
                shape = (batch, len(positions), self.config.vocab_size)
                here = torch.empty(shape, dtype=self.dtype, device=self.device)
            told.append(self.exchange.from_rank(here, owner))
        return torch.cat(told, 1)
