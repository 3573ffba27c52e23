"""Measures the rate of some work: the best of several runs, on sizes that grow until they take long enough."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

PATIENCE = 4
"""Sizes grow until the next one would take PATIENCE times SECONDS."""
GROWTH = 4

SECONDS = 0.3
"""Duration of each measurement, not counting the first call."""


class Work(NamedTuple):
    """Something to call, and the amount of work that one call does, in operations or bytes."""

    call: Callable[[], Any]
    amount: int


def growing(largest: int) -> tuple[int, ...]:
    """Sizes up to `largest`, each GROWTH times the previous one."""
    smaller = itertools.takewhile(lambda size: size < largest, (GROWTH**n for n in itertools.count()))
    return (*smaller, largest)


def growing_rate(
    of_size: Callable[[int], Work], sizes: Sequence[int], device: str, seconds: float | None = None
) -> float:
    """Work per second at the largest of the ascending sizes that is fast enough; `seconds` defaults to SECONDS."""
    limit, work = seconds or SECONDS, of_size(sizes[0])
    best_seconds(work.call, device, 0)  # a kernel's very first call may include loading and initialisation
    for size in sizes[1:]:
        once, bigger = best_seconds(work.call, device, limit / 32), of_size(size)
        if once * bigger.amount > PATIENCE * limit * work.amount:
            break
        work = bigger
    return work.amount / best_seconds(work.call, device, limit)


def best_seconds(work: Callable[[], Any], device: str, seconds: float = SECONDS) -> float:
    """Seconds of the fastest call among as many as fit into `seconds`; the first is a warm-up, unless it is slow."""

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
