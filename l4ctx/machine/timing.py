"""How fast some work is here: the best of several runs, with work that grows until a clock can tell."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

PATIENCE = 4
"""Work grows until the next size would take so many times SECONDS."""
GROWTH = 4

SECONDS = 0.3
"""Of each measurement, but for the first call."""


class Work(NamedTuple):
    """Something to call, and how much is done by it: operations or bytes."""

    call: Callable[[], Any]
    amount: int


def growing(largest: int) -> tuple[int, ...]:
    """Sizes up to the largest, each GROWTH times the one before."""
    smaller = itertools.takewhile(lambda size: size < largest, (GROWTH**n for n in itertools.count()))
    return (*smaller, largest)


def growing_rate(
    of_size: Callable[[int], Work], sizes: Sequence[int], device: str, seconds: float | None = None
) -> float:
    """What is done a second, at the largest of the ascending sizes that is quick enough; `seconds` is SECONDS unless
    given."""
    limit, work = seconds or SECONDS, of_size(sizes[0])
    best_seconds(work.call, device, 0)  # the very first call of a kernel may load and start what it needs
    for size in sizes[1:]:
        once, bigger = best_seconds(work.call, device, limit / 32), of_size(size)
        if once * bigger.amount > PATIENCE * limit * work.amount:
            break
        work = bigger
    return work.amount / best_seconds(work.call, device, limit)


def best_seconds(work: Callable[[], Any], device: str, seconds: float = SECONDS) -> float:
    """Of one call, in the best of as many as fit into `seconds`; the first one warms up, unless it took long itself."""

    def timed() -> float:
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    best = timed()
    if best > 2 * seconds:
        return best
    began, best = time.perf_counter(), math.inf
    while best == math.inf or time.perf_counter() - began < seconds:
        best = min(best, timed())
    return best
