"""A list of operations on buffers, recorded once and run by all threads in one call: what a CUDA graph is on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from model.simd import words as w

if TYPE_CHECKING:
    from model.simd.engine import Engine


class Operation(NamedTuple):
    """A function on units of work, with its arguments; see `model.simd.words`."""

    function: int
    arguments: Sequence[int]
    units: int = 0
    units_a_row: int = 0
    grain: int = 1
    shares: int = 1
    waits: bool = True  # for all operations before it; else it must not depend on those since the last that waited


class Program:
    """Operations that run one after the other, for any number of rows that the buffers have room for.

    `kept` are the tensors whose addresses they use. Shares of an operation go to threads as they come; each number is
    computed by one thread, in an order that depends neither on threads nor on the number of rows.
    """

    def __init__(self, engine: Engine, operations: Sequence[Operation], kept: Sequence[Any]) -> None:
        self._engine = engine
        self._kept = list(kept)
        self._arguments = [torch.tensor(operation.arguments, dtype=torch.int64) for operation in operations]
        self._words = torch.zeros(2 * len(operations), w.LINE // w.WORD, dtype=torch.int64)
        for number, (operation, arguments) in enumerate(zip(operations, self._arguments, strict=True)):
            function, _, *numbers = operation
            line = torch.tensor([function, arguments.data_ptr(), *map(int, numbers)])
            self._words[number, : len(line)] = line
        self._stages = [number for number, operation in enumerate(operations) if operation.waits]
        self._count, self._at = len(operations), self._words.data_ptr()

    def run(self, rows: int) -> None:
        counters = self._at + w.LINE * self._count
        self._engine.run(self._at, self._count, counters, rows, self._stages)

    def set_argument(self, operation: int, place: int, value: int) -> None:
        self._arguments[operation][place] = value
