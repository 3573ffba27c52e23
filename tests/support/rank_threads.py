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

from model.context_division import ContextRank
from model.division import TensorRank

T = TypeVar("T")
SECONDS = 60.0


class Together:
    """So many ranks; `run` gives each its exchange."""

    def __init__(self, count: int, turn: threading.Lock | None = None) -> None:
        """`turn` is that of other ranks that compute meanwhile."""
        self.count = count
        self.exchanges = 0
        self.turn, self._barrier = turn or threading.Lock(), threading.Barrier(count)
        self._given: list[tuple[str, list[Tensor]]] = [("", [])] * count
        self._groups: list[Together] = []

    def run(self, work: Callable[[ThreadExchange], T]) -> list[T]:
        """What `work` returns on each rank. Raises what one of them raises."""
        return self._started(lambda number: work(ThreadExchange(self, number)))

    def run_context(self, work: Callable[[ThreadContextExchange], T]) -> list[T]:
        """The same with context ranks."""
        return self._started(lambda number: work(ThreadContextExchange(self, number)))

    def run_mesh(
        self, context: int, work: Callable[[ThreadExchange, ThreadExchange, ThreadContextExchange], T]
    ) -> list[T]:
        """The same with tensor x context ranks: `work` gets the exchange of all, and those of its row and column."""
        tensor = self.count // context
        self._groups = [Together(tensor, self.turn) for _ in range(context)]
        self._groups += [Together(context, self.turn) for _ in range(tensor)]

        def on(number: int) -> T:
            row, column = self._groups[number // tensor], self._groups[context + number % tensor]
            of_row = ThreadExchange(row, number % tensor)
            return work(ThreadExchange(self, number), of_row, ThreadContextExchange(column, number // tensor))

        return self._started(on)

    def _started(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self.count) as threads:
            begun = [threads.submit(self._run, work, number) for number in range(self.count)]
        failures = [error for future in begun if (error := future.exception()) is not None]
        for error in failures:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in begun]

    def exchange(self, number: int, what: str, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors; all ranks must be at the same exchange."""
        self._given[number] = what, [x.clone() for x in tensors]
        self.exchanges += number == 0
        self.turn.release()
        try:
            self._barrier.wait(SECONDS)
            found = list(self._given)
            self._barrier.wait(SECONDS)
        finally:
            self.turn.acquire()
        assert {other for other, _ in found} == {what}, f"ranks do different things: {[name for name, _ in found]}"
        return [given for _, given in found]

    def _run(self, work: Callable[[int], T], number: int) -> T:
        with self.turn:
            try:
                return work(number)
            except BaseException:
                for group in (self, *self._groups):
                    group._barrier.abort()
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
        return [given for (given,) in self._together.exchange(self.rank.number, "all", [x])]


class ThreadContextExchange:
    """See model.context_parallel.ContextExchange. Counts the bytes that this rank sent."""

    def __init__(self, together: Together, number: int) -> None:
        self.rank = ContextRank(number, together.count)
        self.sent_bytes = 0
        self.together = together

    def from_rank(self, x: Tensor, number: int) -> Tensor:
        if number == self.rank.number:
            self.sent_bytes += x.nbytes * (self.rank.count - 1)
        found = [given for (given,) in self.together.exchange(self.rank.number, f"from {number}", [x])]
        assert {each.shape for each in found} == {x.shape} and {each.dtype for each in found} == {x.dtype}
        return found[number]

    def returned(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self.sent_bytes += sum(part.nbytes for number, part in enumerate(parts) if number != self.rank.number)
        found = self.together.exchange(self.rank.number, "returned", parts)
        return [given[self.rank.number] for given in found]
