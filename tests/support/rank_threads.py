"""Several ranks as threads of one process, of which one computes at a time: what they hold and sum, without processes.

Expanding stored weights goes through buffers that a process has once, so they take turns between exchanges.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from model.division import TensorRank

T = TypeVar("T")
SECONDS = 60.0


class Together:
    """So many ranks; `run` gives each its exchange."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.exchanges = 0
        self._turn, self._barrier = threading.Lock(), threading.Barrier(count)
        self._given: list[Tensor] = [torch.empty(0)] * count

    def run(self, work: Callable[[ThreadExchange], T]) -> list[T]:
        """What `work` returns on each rank. Raises what one of them raises."""
        with ThreadPoolExecutor(self.count) as threads:
            begun = [threads.submit(self._run, work, number) for number in range(self.count)]
        failures = [error for future in begun if (error := future.exception()) is not None]
        for error in failures:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in begun]

    def exchange(self, number: int, x: Tensor) -> list[Tensor]:
        """Every rank's x."""
        self._given[number] = x.clone()
        self.exchanges += number == 0
        self._turn.release()
        try:
            self._barrier.wait(SECONDS)
            found = list(self._given)
            self._barrier.wait(SECONDS)
        finally:
            self._turn.acquire()
        return found

    def _run(self, work: Callable[[ThreadExchange], T], number: int) -> T:
        with self._turn:
            try:
                return work(ThreadExchange(self, number))
            except BaseException:
                self._barrier.abort()
                raise


class ThreadExchange:
    """See model.parallel.Exchange."""

    def __init__(self, together: Together, number: int) -> None:
        self.rank = TensorRank(number, together.count)
        self._together = together

    def summed(self, x: Tensor) -> Tensor:
        return torch.stack([part.float() for part in self._all(x)]).sum(0).to(x.dtype)

    def gathered(self, x: Tensor, total: int) -> Tensor:
        found = torch.cat(self._all(x), -1)
        assert found.shape[-1] == total
        return found

    def from_first(self, x: Tensor) -> Tensor:
        return self._all(x)[0]

    def to_first(self, x: Tensor, into: Sequence[Tensor] | None = None) -> None:
        found = self._all(x)
        assert (into is None) == (self.rank.number > 0)
        for place, part in zip(into or (), found, strict=False):
            place.copy_(part)

    def _all(self, x: Tensor) -> list[Tensor]:
        return self._together.exchange(self.rank.number, x)
