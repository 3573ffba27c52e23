"""Finds where the newest tokens of an answer occur in the answer itself, which grows. Imports no torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from l4ctx.drafts.index import DEPTH, NO_MATCH, Match, common_length, tokens_before

PATTERNS = (4, 2, 1)
"""Lengths, in tokens, that are looked for in this order: the last place with the first of them that occurs is taken."""


class GrowingText:
    """An answer in progress, after the end of its prompt: 8 bytes a token and no index, for answers are short."""

    def __init__(self, prompt: array[int]) -> None:
        """`prompt`: what precedes the answer, as far as matches may begin there."""
        self.ids = prompt[:]
        self._bytes = bytearray(self.ids.tobytes())

    def extend(self, tokens: Iterable[int]) -> None:
        added = array("i", tokens)
        self.ids.extend(added)
        self._bytes += added.tobytes()

    @property
    def newest(self) -> array[int]:
        """The last DEPTH tokens, newest first."""
        return tokens_before(self.ids, len(self.ids), DEPTH)

    def find(self, newest: array[int]) -> Match:
        """The last place with a match of 4 tokens, else of 2, else of 1; at least one token follows it."""
        for length in PATTERNS:
            position = self._last(newest[length - 1 :: -1]) if length <= len(newest) else 0
            if position:
                return Match(common_length(tokens_before(self.ids, position, DEPTH), newest), position)
        return NO_MATCH

    def following(self, match: Match, tokens: int) -> array[int]:
        """What follows may reach the end of the answer; it then goes on as it has done since the match."""
        period = len(self.ids) - match.position
        return array("i", (self.ids[match.position + n % period] for n in range(tokens)))

    def _last(self, pattern: array[int]) -> int:
        """The position after the last occurrence of `pattern` that is not the end of the answer; 0 if there is none."""
        end, size = len(self._bytes) - self.ids.itemsize, self.ids.itemsize
        while (found := self._bytes.rfind(pattern.tobytes(), 0, end)) % size:
            end = found + len(pattern) * size - 1  # not at the beginning of a token
            if found < 0:
                return 0
        return found // size + len(pattern)
