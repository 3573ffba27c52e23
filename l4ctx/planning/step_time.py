"""How many tokens a prefill step may read, and how long a step takes by the machine's speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from l4ctx.planning.workload import Capacity, Workload
from model.costs import reading_operations

STREAMING_CHUNK_SIZES = (16384, 32768, 65536, 131072, 262144)
"""Tried in this order while reading weights again for each prefill chunk takes longer than computing it."""

PREFILL_CHUNK_SIZES = (8192, 4096, 2048, 1024, 512, 256)
"""Tried in this order by default. Larger chunks are faster and need more memory for activations."""

MOST_PARTS = 4096
"""Of a prefill, whose times are estimated apart."""

WORTH_GROWING = 0.95
"""A larger prefill chunk is taken if a token takes less than this share of the time."""


def parts_of(steps: int) -> Iterator[range]:
    """Numbers of so many prefill steps, consecutive ones together where there are more than MOST_PARTS."""
    together = -(-steps // MOST_PARTS) or 1
    for first in range(0, steps, together):
        yield range(first, min(first + together, steps))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a prefill step at the beginning of a text, by the machine's speed."""

    tokens: int
    computing: float
    reading: float  # weights that are streamed

    @classmethod
    def of(cls, workload: Workload, prefill_chunk_size: int, streamed: int, capacity: Capacity) -> StepTime:
        """`streamed` are the bytes of weights that the step reads again."""
        tokens = max(1, min(prefill_chunk_size, workload.read_tokens))
        operations = reading_operations(workload.config, 0, tokens).total
        return cls(tokens, operations / capacity.operations, streamed / capacity.reading)

    @property
    def is_hidden(self) -> bool:
        """Whether reading takes no longer than computing, at the same time."""
        return self.reading <= self.computing

    @property
    def a_token(self) -> float:
        return max(self.computing, self.reading) / self.tokens
