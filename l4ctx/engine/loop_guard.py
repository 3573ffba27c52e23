"""Detects an answer that is stuck in a loop, from its token ids alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

LONGEST_PERIOD = 128
"""Longest repeated passage that is detected, in tokens."""

LOOP_TOKENS, LOOP_REPEATS = 300, 4
"""A repeated passage of n tokens is a loop once it fills the last LOOP_TOKENS + LOOP_REPEATS * n tokens: one token 304
times, five 64 times, sixty nine times. Horizontal rules, tables and lists of thirty equal values stay below that; the
default length limit of an answer is above it for every n."""


@dataclass(frozen=True)
class Loop:
    """The answer's last `period` tokens, `times` in a row."""

    period: int
    times: int


class LoopGuard:
    """Takes an answer's tokens one by one, at a cost of at most LONGEST_PERIOD comparisons each."""

    def __init__(self) -> None:
        self.loop: Loop | None = None  # the first one found
        self._last: deque[int] = deque(maxlen=LONGEST_PERIOD)  # the newest first
        self._equal = [0] * LONGEST_PERIOD  # at n - 1: how many of the last tokens in a row equal the one n before

    def push(self, token: int) -> Loop | None:
        """The loop that this token completes, if any; of several, the one with the shortest period."""
        equal, loop = self._equal, None
        for index, earlier in enumerate(self._last):
            if earlier != token:
                equal[index] = 0
                continue
            equal[index] += 1
            period = index + 1
            repeated = equal[index] + period
            if loop is None and repeated >= LOOP_TOKENS + LOOP_REPEATS * period:
                loop = Loop(period, repeated // period)
        self._last.appendleft(token)
        self.loop = self.loop or loop
        return loop
