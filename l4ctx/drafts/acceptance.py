"""How many tokens of a draft are worth verifying, from how earlier drafts fared.

Never from timing, so that a run can be repeated exactly. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_right

MATCH_LENGTHS = (1, 2, 3, 4, 6, 10, 20)
"""The shortest match, in tokens, of each class that chances are counted for."""

FIRST_CHANCES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of each class, before there is evidence."""

FIRST_WEIGHT, KEPT = 4.0, 0.9
"""Observations that the first chances count as, and what remains of older evidence at each observation."""


class Acceptance:
    """The chance that a draft's next token is right, by the length of the match that it would extend."""

    def __init__(self) -> None:
        self._seen = [FIRST_WEIGHT] * len(MATCH_LENGTHS)
        self._right = [FIRST_WEIGHT * chance for chance in FIRST_CHANCES]

    def chance(self, match_length: int) -> float:
        at = bisect_right(MATCH_LENGTHS, match_length) - 1
        return self._right[at] / self._seen[at]

    def observe(self, match_length: int, is_right: bool) -> None:
        at = bisect_right(MATCH_LENGTHS, match_length) - 1
        self._seen[at] = KEPT * self._seen[at] + 1
        self._right[at] = KEPT * self._right[at] + is_right

    def worth_verifying(self, match_length: int, most: int, row_cost: float, rows: int = 1) -> int:
        """The number of draft tokens, at most `most`, that gives the most tokens for their time.

        `row_cost` is what one more token adds to a forward, as a share of a forward of one token. A forward that `rows`
        answers share, with k draft tokens of one of them, is expected to give rows + p1 + p1 p2 + ... tokens in the
        time of 1 + (rows - 1 + k) * row_cost forwards.
        """
        expected, seconds, chance = float(rows), 1 + (rows - 1) * row_cost, 1.0
        best, best_rate = 0, expected / seconds
        for count in range(1, most + 1):
            chance *= self.chance(match_length + count - 1)
            expected += chance
            rate = expected / (seconds + count * row_cost)
            if rate > best_rate:
                best, best_rate = count, rate
        return best
