"""One layer's self-attention: projections, rotary embedding, QK norm, temperature tuning; and the KV cache interface.

Attention has no branch on the kind of cache: the cache stores what `append` is given, and `segments` yields what the
queries may attend to, wherever it was kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TextConfig
from model.gpu.support import Pages
from model.kernels.attend import AttentionState, Backend, KVSegment, attend, attention_state, merge
from model.kernels.masks import AttentionMask
from model.kernels.watch import Found, Observer, Watch, tell
from model.layers import Linear, in_pieces
from model.rope import phases, rotate


class KVCache(Protocol):
    """The interface that the model needs from a KV cache. All rows of a batch share one offset; there is no padding."""

    offset: int
    """Number of committed tokens, which is the absolute position of the first token of this forward."""

    length: int
    """The most tokens that the run will hold; rope_type longrope chooses its table by it."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (B, H_kv, T, D) of the new tokens at `offset`; visible to `segments` immediately."""

    def segments(self, layer: int, queries: range, within: range | None = None) -> Iterable[KVSegment]:
        """Yields what queries at these absolute positions may need, oldest first; of a NoPE layer only what lies
        `within` these positions, which begin where `shared_tokens` ends, and end there or among newer tokens.

        A segment is valid until the next one is requested.
        """
        ...

    def reserve(self, tokens: int) -> Pages | None:
        """Makes room for the next `tokens` tokens, and says by layer where keys and values lie and these will.

        The object is the same one as long as nothing has moved. None where that cannot be told.
        """
        ...

    def shared_tokens(self, others: Sequence[Any]) -> int:
        """How many first tokens of the NoPE layers are held once for this cache and the others, which are forks."""
        ...

    def advance(self, num_tokens: int) -> None:
        """Commits the new tokens in all layers."""


class Part(NamedTuple):
    """One sequence's new tokens in a forward."""

    positions: range  # absolute positions of the new tokens
    queries: range  # those whose outputs are wanted in the last layer: all, the last, or none
    start: int  # place of the first one among the forward's tokens
    cache: KVCache | None
    observer: Observer | None = None  # of what its queries attend to in NoPE layers

    @property
    def tokens(self) -> slice:
        """Places of the new tokens among the forward's."""
        return slice(self.start, self.start + len(self.positions))

    @property
    def wanted(self) -> range:
        """Places of the queries among the forward's tokens."""
        first = self.start + self.queries.start - self.positions.start
        return range(first, first + len(self.queries))


class Step(NamedTuple):
    """What is the same for all layers in one forward of T tokens, in one or several sequences."""

    parts: tuple[Part, ...]
    shared: int  # first tokens of the NoPE layers that several sequences read in one place
    rotation: Tensor  # (T, D // 2) complex64, for RoPE layers
    temperature: Tensor | None  # (T,) float32, for NoPE layers
    backend: Backend

    @classmethod
    def at(
        cls,
        config: TextConfig,
        counts: Sequence[int],
        backend: Backend,
        caches: Sequence[KVCache | None],
        device: torch.device,
        observers: Sequence[Observer | None] | None = None,
    ) -> Step:
        """Of so many new tokens for each of the caches, or for a sequence that begins without one."""
        parts: list[Part] = []
        rotations, temperatures = [], []
        observers = observers or [None] * len(counts)
        for count, cache, observer in zip(counts, caches, observers, strict=True):
            start = cache.offset if cache is not None else 0
            positions = range(start, start + count)
            assert positions, "no tokens"
            parts.append(Part(positions, positions, parts[-1].tokens.stop if parts else 0, cache, observer))
            length = max(positions.stop, cache.length) if cache is not None else positions.stop
            rotations.append(phases(config, positions.start, positions.stop, length, device))
            temperatures.append(query_temperature(config, positions, device))
        known = [x for x in temperatures if x is not None]
        first, *others = caches
        return cls(
            tuple(parts),
            first.shared_tokens(others) if first is not None and others else 0,
            _joined(rotations),
            _joined(known) if known else None,
            backend,
        )

    def narrowed(self, wanted: Sequence[int]) -> Step:
        """The step of the last layer, whose outputs are wanted for so many last tokens of each sequence."""
        return self._replace(
            parts=tuple(
                part._replace(queries=part.positions[len(part.positions) - count :])
                for part, count in zip(self.parts, wanted, strict=True)
            )
        )

    def on(self, device: torch.device) -> Step:
        """With its tensors on the device of the layers that follow."""
        temperature = None if self.temperature is None else self.temperature.to(device)
        return self._replace(rotation=self.rotation.to(device), temperature=temperature)

    def commit(self) -> None:
        """Makes the new tokens those of their caches, once all is computed."""
        for part in self.parts:
            if part.cache is not None:
                part.cache.advance(len(part.positions))

    @property
    def num_queries(self) -> int:
        return sum(len(part.queries) for part in self.parts)

    @property
    def wanted(self) -> slice | list[int]:
        """Index of the queries among the T tokens."""
        if self.num_queries == self.parts[-1].tokens.stop:
            return slice(None)
        if len(self.parts) == 1:
            wanted = self.parts[0].wanted
            return slice(wanted.start, wanted.stop)
        return [place for part in self.parts for place in part.wanted]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def query_temperature(config: TextConfig, positions: range, device: torch.device) -> Tensor | None:
    """Scale of NoPE queries by absolute position, (T,) float32: 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)).

    None when the checkpoint does not use it. Source: https://arxiv.org/abs/2501.19399.
    """
    if not config.attn_temperature_tuning:
        return None
    position = torch.arange(positions.start, positions.stop, device=device)
    return torch.log1p(((position + 1) // config.floor_scale).float()) * config.attn_scale + 1


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.uses_rope = config.uses_rope(layer)
        self.tunes_temperature = config.attn_temperature_tuning and not self.uses_rope
        self.qk_norm_eps = config.rms_norm_eps if config.use_qk_norm and self.uses_rope else None
        self.mask = AttentionMask(config.attention_chunk_size if self.uses_rope else None)
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * d, c, bias=bias)

    def forward(self, x: Tensor, step: Step) -> Tensor | None:
        """x (B, T, C) -> attention output for the step's queries, (B, num_queries, C); None if there are none."""
        keys = self._rotated(self._heads(self.k_proj(x)), step.rotation).transpose(1, 2)
        values = self._heads(self.v_proj(x)).transpose(1, 2)
        self.store(keys, values, step)
        if not step.num_queries:
            return None
        wanted = step.wanted
        q = self._rotated(self._heads(self.q_proj(x[:, wanted])), step.rotation[wanted])
        if self.tunes_temperature and step.temperature is not None:
            temperature = step.temperature[wanted][:, None, None]
            q = in_pieces(q, lambda piece, here: (piece * temperature[here]).to(piece.dtype))
        out = self.attended(q.transpose(1, 2), step, KVSegment(keys, values, 0))
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def store(self, keys: Tensor, values: Tensor, step: Step) -> None:
        """Gives each sequence's cache its keys and values (B, H_kv, T, D), which it may hold until the next layer's."""
        for part in step.parts:
            if part.cache is not None:
                part.cache.append(self.layer, keys[:, :, part.tokens], values[:, :, part.tokens])

    def attended(self, q: Tensor, step: Step, new: KVSegment) -> Tensor:
        """Queries (B, H, num_queries, D) -> attention of each sequence to its own keys, the same shape.

        What sequences share is attended once, by all queries. `new` are the keys and values of this forward.
        """
        first = step.parts[0]
        if len(step.parts) == 1:
            segments: Iterable[KVSegment] = [new]
            if first.cache is not None:
                segments = first.cache.segments(self.layer, first.queries)
            if (watch := self._watch(q, first.queries, step.parts)) is None:
                return attend(q, first.queries, segments, self.mask, step.backend)
            state = attention_state(q, first.queries, segments, self.mask, step.backend, watch)
            self._tell(first, state, [watch.found])
            return state.out.to(q.dtype)
        shared = 0 if self.uses_rope else step.shared
        common = watch = None
        if shared:
            assert first.cache is not None
            later = range(shared, shared + step.num_queries)  # any positions behind the keys: all are seen
            segments = first.cache.segments(self.layer, later, range(shared))
            watch = self._watch(q, later, step.parts)
            common = attention_state(q, later, segments, self.mask, step.backend, watch)
        parts = self._own(q, step, shared, common, None if watch is None else watch.found)
        return torch.cat([state.out.to(q.dtype).transpose(1, 2) for state in parts], 1).transpose(1, 2)

    def _watch(self, q: Tensor, positions: range, parts: Sequence[Part]) -> Watch | None:
        """What follows the attention of queries (1, H, T, D) for those parts that are observed."""
        observers = [part.observer for part in parts if part.observer is not None]
        if self.uses_rope or not observers:
            return None
        starts, stops = zip(*((observer.within.start, observer.within.stop) for observer in observers), strict=True)
        return Watch(q, positions, range(min(starts), max(stops)))

    def _tell(self, part: Part, state: AttentionState, found: Sequence[Found]) -> None:
        assert part.observer is not None
        tell(part.observer, self.layer, part.queries, state.lse[0], found)

    def _own(
        self, q: Tensor, step: Step, shared: int, common: AttentionState | None, found: Found | None
    ) -> Iterator[AttentionState]:
        """Each sequence's attention to its own keys behind the `shared` tokens, merged with what is common to all.

        `found` is what their queries attend to in common, where it is watched.
        """
        counts, start = [len(part.queries) for part in step.parts], 0
        in_common = [[one] for one in found.split(counts)] if found is not None else [[] for _ in counts]
        for part, seen in zip(step.parts, in_common, strict=True):
            here = slice(start, start + len(part.queries))
            start = here.stop
            if here.start == here.stop:
                continue
            assert part.cache is not None, "several sequences without a cache"
            segments = part.cache.segments(self.layer, part.queries, range(shared, part.positions.stop))
            is_seen = part.observer is not None and part.observer.within.stop > shared
            watch = self._watch(q[:, :, here], part.queries, [part]) if is_seen else None
            state = attention_state(q[:, :, here], part.queries, segments, self.mask, step.backend, watch)
            if common is not None:
                state = merge(AttentionState(*(x[:, :, here] for x in common)), state)
            if watch is not None:
                seen.append(watch.found)
            if part.observer is not None and seen:
                self._tell(part, state, seen)
            yield state

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)

    def _rotated(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Applies rotary embedding to x (B, T, H, D), then QK norm over each head. In RoPE layers only."""
        if not self.uses_rope and self.qk_norm_eps is None:
            return x
        return in_pieces(x, lambda piece, here: self._rotated_piece(piece, rotation[here]))

    def _rotated_piece(self, x: Tensor, rotation: Tensor) -> Tensor:
        if self.uses_rope:
            x = rotate(x, rotation)
        return x if self.qk_norm_eps is None else F.rms_norm(x, (self.head_dim,), None, self.qk_norm_eps)
