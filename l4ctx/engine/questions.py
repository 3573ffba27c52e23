"""Many questions about the same documents, several at a time: each is a fork of the cache that holds the documents.

A scheduler over rows. Every forward feeds all rows at once, so that what they share is read once: a row that is being
answered its newest token, one that has just begun the tokens of its question. Decoding to text is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from cache.context import ContextKVCache, Continuation, continuation
from cache.grid import prefill_grid
from cache.hybrid import HybridKVCache
from l4ctx.engine.row import Row
from model.kernels.watch import Observer
from model.simd.products import FEW_ROWS
from model.transformer import Transformer

Q = TypeVar("Q")


class Asked(NamedTuple, Generic[Q]):
    """A question to be answered."""

    question: Q  # what the caller knows it by
    ids: Sequence[int]  # its part of the prompt: everything behind the documents
    room: int  # the most tokens of question and answer


@dataclass(frozen=True)
class Answered(Generic[Q]):
    question: Q
    row: Row  # with the reason why it ended
    ids: Sequence[int]  # of the answer


class Round(NamedTuple, Generic[Q]):
    """What one forward brought: answers that ended, and how many tokens of all answers are new."""

    answered: list[Answered[Q]]
    new_tokens: int


def answer_rounds(
    model: Transformer,
    documents: HybridKVCache | ContextKVCache,
    asked: Iterator[Asked[Q]],
    begin: Callable[[Q, Continuation, int], Row],
    *,
    rows: int,
    step_tokens: int,
) -> Iterator[Round[Q]]:
    """Answers up to `rows` questions at a time, in the order in which they are asked; a row that ends makes room.

    `begin` makes the row of a question from its cache, which holds the documents and the question, and the question's
    last token. Forwards have at most `step_tokens` tokens, or one for each row if those are more. Drafts make none
    longer than FEW_ROWS tokens: up to there a row's results do not depend on the others. `documents` does not change.
    Raises GenerationError.
    """
    places: list[_Place[Q]] = []
    while True:
        while len(places) < rows and (one := next(asked, None)) is not None:
            places.append(_Place(one, continuation(documents, one.room), begin))
        if not places:
            return
        feeds = _feeds(places, step_tokens)
        caches: list[Any] = [feed.place.cache for feed in feeds]
        logits = model.forward_ragged(
            [feed.ids for feed in feeds],
            caches,
            [feed.wanted for feed in feeds],
            [feed.place.observer for feed in feeds],
        )
        taken = zip(feeds, logits, strict=True) if logits is not None else ()
        new_tokens = sum(feed.place.take(found) for feed, found in taken if feed.wanted)
        ended = [place for place in places if place.answered is not None]
        places = [place for place in places if place.answered is None]
        yield Round([place.answered for place in ended if place.answered is not None], new_tokens)


class _Place(Generic[Q]):
    """A question that is being read or answered."""

    def __init__(self, asked: Asked[Q], cache: Continuation, begin: Callable[[Q, Continuation, int], Row]) -> None:
        self.cache = cache
        self._asked, self._begin = asked, begin
        self._start, self._read_stop = cache.offset, cache.offset + len(asked.ids) - 1
        self._row: Row | None = None
        self._answer: list[int] = []

    @property
    def is_read(self) -> bool:
        """Whether the answer can begin: all tokens of the question but the last one are in the cache."""
        return self.cache.offset >= self._read_stop

    @property
    def observer(self) -> Observer | None:
        """Of the answer; nothing while the question is read."""
        return None if self._row is None else self._row.observer

    def piece(self, most: int) -> Sequence[int]:
        """The next tokens of the question, cut where a prefill in steps of `most` tokens would cut them."""
        config, block = self.cache.config, self.cache.layout.block_tokens
        positions = next(prefill_grid(self.cache.offset, self._read_stop, most, config.attention_chunk_size, block))
        return self._asked.ids[positions.start - self._start : positions.stop - self._start]

    def feed(self, rows: int, most_drafted: int) -> list[int]:
        """The tokens that continue the answer, as `Row.feed` says."""
        if self._row is None:
            self._row = self._begin(self._asked.question, self.cache, self._asked.ids[-1])
        return self._row.feed(rows, most_drafted)

    def take(self, logits: Tensor) -> int:
        """Logits (T, V) of the tokens that were fed; returns how many of the answer are new."""
        assert self._row is not None
        new = self._row.take(logits)
        self._answer += new
        return len(new)

    @property
    def answered(self) -> Answered[Q] | None:
        """None until the answer ends."""
        if self._row is None or self._row.stop_reason is None:
            return None
        return Answered(self._asked.question, self._row, self._answer)


class _Feed(NamedTuple, Generic[Q]):
    place: _Place[Q]
    ids: Sequence[int]
    wanted: int  # of how many of the last ones the logits are wanted


def _feeds(places: Sequence[_Place[Q]], step_tokens: int) -> list[_Feed[Q]]:
    """What the next forward gets: first answers, then as many tokens of questions as there is room for."""
    feeds = list[_Feed[Q]]()
    answering = [place for place in places if place.is_read]
    drafted = max(0, min(FEW_ROWS, step_tokens) - len(answering))  # tokens of drafts that may still be added
    for place in answering:
        ids = place.feed(len(answering), drafted)
        feeds.append(_Feed(place, ids, len(ids)))
        drafted -= len(ids) - 1
    left = max(step_tokens - sum(len(feed.ids) for feed in feeds), 0 if feeds else 1)
    for place in places:
        if left > 0 and not place.is_read:
            piece = place.piece(left)
            feeds.append(_Feed(place, piece, 0))
            left -= len(piece)
    return feeds
