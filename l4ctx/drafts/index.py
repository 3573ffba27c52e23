"""Finds where the newest tokens occur in a text that was read. Imports no torch.

The order that it searches comes from `l4ctx.drafts.order`, or from a saved context: a wrong one costs time, never an
answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

DEPTH = 32
"""The longest match that is looked for, in tokens."""

SEGMENT_TOKENS = 2**20
"""Positions that are sorted together; each segment takes 20 comparisons a look-up."""

ORDER_BYTES = 4
"""Of each token of the text, beside its id."""

SORTING_BYTES = 96 * SEGMENT_TOKENS
"""Of memory at most while an order is made."""


class Match(NamedTuple):
    """The newest `length` tokens, at most DEPTH, equal those before `position` of the text."""

    length: int
    position: int


NO_MATCH = Match(0, 0)


class Text(Protocol):
    """Tokens that drafts are copied from."""

    def find(self, newest: array[int]) -> Match:
        """The longest match of `newest`, which is read backwards: the newest token first."""
        ...

    def following(self, match: Match, tokens: int) -> array[int]:
        """At most so many tokens from the match's position on."""
        ...


class IndexedText:
    """A text whose positions are sorted by the tokens before them: 8 bytes a token.

    `order` holds 32-bit positions, segment by segment: positions n * SEGMENT_TOKENS up to the next segment's, sorted by
    the DEPTH tokens before each (also of earlier segments), read backwards, then by position. It may be shorter than
    the text, whose first positions alone are found then.
    """

    def __init__(self, ids: array[int], order: array[int]) -> None:
        assert len(order) <= len(ids), (len(ids), len(order))
        self.ids, self.order = ids, order

    def find(self, newest: array[int]) -> Match:
        """Of matches of equal length one in the last segment, and of DEPTH tokens the last one there."""
        ids, order, wanted, best = self.ids, self.order, newest[:DEPTH], NO_MATCH
        first = (len(order) - 1) // SEGMENT_TOKENS * SEGMENT_TOKENS
        for start in range(first, -1, -SEGMENT_TOKENS):
            low = start
            high = stop = min(start + SEGMENT_TOKENS, len(order))
            while low < high:  # the first place whose tokens come after `wanted`
                middle = (low + high) // 2
                if tokens_before(ids, order[middle], len(wanted)) <= wanted:
                    low = middle + 1
                else:
                    high = middle
            for place in range(max(start, low - 1), min(low + 1, stop)):
                length = common_length(tokens_before(ids, order[place], len(wanted)), wanted)
                if length > best.length:
                    best = Match(length, order[place])
        return best

    def following(self, match: Match, tokens: int) -> array[int]:
        return self.ids[match.position : match.position + tokens]


def tokens_before(ids: array[int], position: int, tokens: int) -> array[int]:
    """The `tokens` before a position, or as many as there are, read backwards."""
    if position == 0:
        return ids[:0]
    stop = position - 1 - tokens
    return ids[position - 1 : stop if stop >= 0 else None : -1]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Of the common prefix."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
