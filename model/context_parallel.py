"""Context parallelism, applied from outside: each rank computes the attention chunks that it owns, and no other.

Embeddings, RoPE layers and feed-forward layers need no other rank; in NoPE layers the ranks meet
(`model.context_attention`). Within a rank tokens are numbered as its own cache does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.attention import Part, Step, query_temperature
from model.config import TextConfig
from model.context_attention import ContextAttention, ContextExchange, Meeting
from model.context_division import Piece
from model.rope import phases
from model.transfers import to_device
from model.transformer import Transformer, Wanted, wanted_tokens


class Row(NamedTuple):
    """One sequence's new tokens, of all ranks."""

    cache: Any  # a ContextCache
    pieces: Sequence[Piece]
    wanted: Sequence[Piece]  # those whose logits are wanted

    @property
    def start(self) -> int:
        return self.pieces[0].positions.start

    def of(self, rank: int) -> list[range]:
        """Positions of the tokens that this rank owns."""
        return [piece.positions for piece in self.pieces if piece.owner == rank]

    def wanted_of(self, rank: int) -> int:
        return sum(len(piece.positions) for piece in self.wanted if piece.owner == rank)


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
        row = self._row(cache, inputs.shape[1], wanted_tokens(logits, [inputs.shape[1]])[0])
        mine = [inputs[:, here.start - row.start : here.stop - row.start] for here in row.of(self.exchange.rank.number)]
        found = self._computed(torch.cat(mine, 1) if mine else None, [row], inputs.shape[0], is_forked=False)
        return None if found is None else found[0]

    @torch.inference_mode()
    def forward_ragged(
        self,
        ids: Sequence[Sequence[int]],
        caches: Sequence[Any],
        logits: Wanted | Sequence[int] = "all",
        observers: Any = None,
    ) -> list[Tensor] | None:
        """As `Transformer.forward_ragged`, with caches that are forks of one (`cache.context.ForkedContextCache`)."""
        assert not any(observers or ()), "context ranks cannot be observed"
        counts = [len(some) for some in ids]
        rows = [self._row(*each) for each in zip(caches, counts, wanted_tokens(logits, counts), strict=True)]
        mine = [
            some[position - row.start]
            for some, row in zip(ids, rows, strict=True)
            for here in row.of(self.exchange.rank.number)
            for position in here
        ]
        own = to_device(torch.tensor([mine]), self.device) if mine else None
        found = self._computed(own, rows, 1, is_forked=True)
        return None if found is None else [x[0] for x in found]

    def _row(self, cache: Any, tokens: int, wanted: int) -> Row:
        size = self.config.attention_chunk_size
        positions = range(cache.offset, cache.offset + tokens)
        last = positions[tokens - wanted :]
        return Row(cache, *(list(self.exchange.rank.pieces(some, size)) for some in (positions, last)))

    def _computed(self, own: Tensor | None, rows: Sequence[Row], batch: int, *, is_forked: bool) -> list[Tensor] | None:
        """The rank's own tokens of all rows -> logits (B, wanted, V) of each row; None if none are wanted."""
        found = None
        with self._meeting(rows, batch, is_forked=is_forked):
            if own is not None:
                step, wanted = self._step(rows)
                found = self._run(own, step, wanted)
            else:
                for layer in self._meeting_layers:
                    layer.serve()
        for row in rows:
            row.cache.advance(sum(len(piece.positions) for piece in row.pieces))
        return self._told(found, rows, batch) if any(row.wanted for row in rows) else None

    @contextmanager
    def _meeting(self, rows: Sequence[Row], batch: int, *, is_forked: bool) -> Iterator[None]:
        """Lets NoPE layers know what this forward is about."""
        cache = rows[0].cache
        meeting = Meeting(
            self.exchange,
            self.config,
            cache.own,
            cache.segment_tokens,
            batch,
            self.dtype,
            self.device,
            self.backend,
            [row.cache for row in rows] if is_forked else (),
        )
        last = self.config.num_hidden_layers - 1
        try:
            for layer in self._meeting_layers:
                layer.meeting = meeting
                layer.rows = [row.wanted if layer.layer == last else row.pieces for row in rows]
            yield
        finally:
            for layer in self._meeting_layers:
                del layer.meeting, layer.rows

    def _step(self, rows: Sequence[Row]) -> tuple[Step, list[int]]:
        """Of the rank's own tokens, and of how many of each row logits are wanted.

        Phases of rotary embedding are relative to the attention chunk; temperatures are of absolute positions.
        """
        rank, parts, rotations, temperatures, wanted = self.exchange.rank, list[Part](), [], [], []
        for row in rows:
            mine = row.of(rank.number)
            if not mine:
                continue
            first = rank.tokens_before(mine[0].start, self.config.attention_chunk_size)
            own = range(first, first + sum(map(len, mine)))
            parts.append(Part(own, own, parts[-1].tokens.stop if parts else 0, row.cache.own))
            length = max(row.cache.length, mine[-1].stop)
            rotations.append(phases(self.config, own.start, own.stop, length, self.device))
            temperatures += [query_temperature(self.config, here, self.device) for here in mine]
            wanted.append(row.wanted_of(rank.number))
        known = [x for x in temperatures if x is not None]
        temperature = torch.cat(known) if known else None
        return Step(tuple(parts), 0, torch.cat(rotations), temperature, self.backend), wanted

    def _told(self, found: Tensor | None, rows: Sequence[Row], batch: int) -> list[Tensor]:
        """Logits (B, tokens, V) that are wanted of each row, from their owners."""
        told, rank = dict[tuple[int, int], Tensor](), self.exchange.rank
        for owner in range(rank.count):
            tokens = sum(row.wanted_of(owner) for row in rows)
            if not tokens:
                continue
            here = found if owner == rank.number else self._empty(batch, tokens)
            assert here is not None
            here, start = self.exchange.from_rank(here, owner), 0
            for number, row in enumerate(rows):
                for piece in row.wanted:
                    if piece.owner == owner:
                        stop = start + len(piece.positions)
                        told[number, piece.positions.start] = here[:, start:stop]
                        start = stop
        return [
            torch.cat([self._empty(batch, 0), *(told[number, piece.positions.start] for piece in row.wanted)], 1)
            for number, row in enumerate(rows)
        ]

    def _empty(self, batch: int, tokens: int) -> Tensor:
        """Room for logits."""
        return torch.empty(batch, tokens, self.config.vocab_size, dtype=self.dtype, device=self.device)
