"""Negative log-likelihoods gathered by position, in ranges that double: 1, 2 and 3, 4 to 7, and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Z95 = 1.959963984540054
"""Of a two-sided interval of 95 %."""

LEAST_TOKENS = 8
"""Of a range that is compared with others: the mean of fewer says nothing."""


@dataclass
class Sums:
    """Of so many tokens: their negative log-likelihoods in nats, and the squares of these."""

    tokens: int = 0
    nats: float = 0.0
    squares: float = 0.0

    def add(self, losses: Sequence[float]) -> None:
        self.tokens += len(losses)
        self.nats += math.fsum(losses)
        self.squares += math.fsum(loss * loss for loss in losses)

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def error(self) -> float:
        """Half of the interval that holds the mean in 95 % of cases, in nats, as if tokens were independent."""
        if self.tokens < 2:
            return math.inf
        variance = max(0.0, self.squares - self.nats * self.mean) / (self.tokens - 1)
        return Z95 * math.sqrt(variance / self.tokens)


@dataclass
class ByPosition:
    """`ranges[k]` is about the tokens at positions 2**k .. 2**(k + 1) - 1, each predicted from all before it."""

    ranges: list[Sums] = field(default_factory=list)

    def add(self, first: int, losses: Sequence[float]) -> None:
        """Losses of the tokens at positions `first` (1 or more) and those behind it."""
        at = first
        while at < first + len(losses):
            number = at.bit_length() - 1
            stop = min(2 ** (number + 1), first + len(losses))
            while len(self.ranges) <= number:
                self.ranges.append(Sums())
            self.ranges[number].add(losses[at - first : stop - first])
            at = stop

    def filled(self) -> list[tuple[int, Sums]]:
        """The first position of each range that has tokens, and what is known of it."""
        return [(2**number, sums) for number, sums in enumerate(self.ranges) if sums.tokens]

    def as_list(self) -> list[dict[str, Any]]:
        return [
            {
                "start": start,
                "stop": start + sums.tokens,
                "tokens": sums.tokens,
                "nats": sums.nats,
                "nats_per_token": sums.mean,
                "perplexity": sums.perplexity,
                "error": sums.error if math.isfinite(sums.error) else None,
            }
            for start, sums in self.filled()
        ]


def with_enough_tokens(ranges: list[tuple[int, Sums]]) -> list[tuple[int, Sums]]:
    """Those of at least LEAST_TOKENS tokens, or all if there are no such."""
    return [(start, sums) for start, sums in ranges if sums.tokens >= LEAST_TOKENS] or ranges
