"""Notices an answer that has begun to repeat itself for good. Knows token ids; nothing of text or models."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

LONGEST_PERIOD = 128
"""Tokens of the longest passage whose repetition is noticed."""

LOOP_TOKENS, LOOP_REPEATS = 300, 4
"""A passage of n tokens is a loop when it fills the last LOOP_TOKENS + LOOP_REPEATS * n tokens: one token 304 times,
five 64 times, sixty nine times. Ruled lines, tables and lists of thirty equal values stay below that; the default
limit of an answer lies above it for every n."""


@dataclass(frozen=True)
class Loop:
    """The answer's last `period` tokens, `times` in a row."""

    period: int
    times: int


class LoopGuard:
    """Takes the tokens of an answer one by one; at most LONGEST_PERIOD comparisons each, whatever the length."""

    def __init__(self) -> None:
        self.loop: Loop | None = None  # the first one found
        self._last: deque[int] = deque(maxlen=LONGEST_PERIOD)  # the newest first
        self._equal = [0] * LONGEST_PERIOD  # of n - 1: how many last tokens each equal the one n before

    def push(self, token: int) -> Loop | None:
        """The loop that this token completes, of the shortest period if of several."""
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
