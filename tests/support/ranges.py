"""Random ranges of positions."""

from __future__ import annotations

import random


def random_ranges(generator: random.Random) -> tuple[range, range]:
    """Ranges of queries and keys: anywhere, possibly empty, overlapping or not."""
    q_start, k_start = generator.randrange(40), generator.randrange(40)
    return (range(q_start, q_start + generator.randrange(40)), range(k_start, k_start + generator.randrange(60)))
