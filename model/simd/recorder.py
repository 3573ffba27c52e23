"""Records programs: which operation of `model.simd.operations` runs on which buffers. Knows matrices, but no layers.

Buffers are float32 and have room for FEW_ROWS rows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.simd import products
from model.simd.layouts import LANES, Layout, Numbers
from model.simd.products import FEW_ROWS, Operand, dtype_name, product_arguments, rows, weight_arguments
from model.simd.program import Operation, Program


class NoCodeError(Exception):
    """There is no code for something, or nothing that compiles it."""


class Heads(NamedTuple):
    """What is done to heads (rows, H, D) that were projected, before attention."""

    rotation: Tensor | None = None  # (FEW_ROWS, D), complex numbers: rotary embedding over interleaved pairs
    epsilon: float | None = None  # of the norm of each head
    temperature: Tensor | None = None  # (FEW_ROWS,) that they are multiplied by


class Slots(NamedTuple):
    """Products of pairs, each a row and one of the row's experts: their arguments, which the choice completes."""

    layout: Layout
    units: int
    arguments: Tensor  # (pairs, words)
    table: Tensor  # (E, words) that an expert's weights are found by
    inputs: Tensor | None  # rows that are read, else each pair has its own
    outputs: Tensor | None  # rows that are added to, likewise

    def words(self) -> list[int]:
        words = [*rows(self.arguments), self.table.data_ptr(), self.table.shape[1]]
        for shared in (self.inputs, self.outputs):
            words += [0, 0] if shared is None else rows(shared)
        return words


class Recorder:
    """Collects operations, each of which waits for those before it unless it is told not to. Raises NoCodeError."""

    def __init__(self) -> None:
        engine = products.find_engine()
        require(engine is not None)
        from model.simd import operations  # which needs llvmlite

        self._code: Any = operations
        self._engine: Any = engine
        self._operations: list[Operation] = []
        self._kept: list[Any] = [_ONE]

    def program(self) -> Program:
        return Program(self._engine, self._operations, self._kept)

    def norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """RMS norm of rows: x / sqrt(mean of x^2 + epsilon) * weight."""
        require(weight.is_contiguous() and weight.device.type == "cpu" and len(weight) % (2 * LANES) == 0)
        function = self._engine.function(self._code.emit_norm, Numbers(dtype_name(weight.dtype)))
        arguments = [0, *rows(x), *rows(out), weight.data_ptr(), len(weight), _bits(epsilon)]
        self._add(Operation(function, arguments, units_a_row=1), x, weight, out)

    def product(
        self,
        operand: Operand,
        x: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        sums: Tensor | None = None,
        waits: bool = True,
    ) -> None:
        """Rows x (C_in) times the matrix; with `sums`, which a Columns layout needs then, added to what is in `out`."""
        bias = None if bias is None else bias.float()
        added = None if sums is None else out
        arguments = product_arguments(operand, x, out, bias=bias, added=added, sums=sums)
        function, count = self._engine.product(operand.layout), operand.shape[0]
        shares = products.shares(operand.layout)
        operation = Operation(function, arguments, count, grain=LANES, shares=shares, waits=waits)
        self._add(operation, operand, x, out, bias, sums)

    def heads(self, x: Tensor, out: Tensor, what: Heads, *, waits: bool = True) -> None:
        """Rows x (H * D) -> `out` (rows, H, D), in its dtype."""
        _, count, head_dim = out.shape
        require(head_dim % LANES == 0)
        flags = [part is not None for part in what]
        form = self._code.HeadsForm(head_dim, dtype_name(out.dtype), *flags)
        rotation = [0, 0] if what.rotation is None else rows(what.rotation)
        temperature = 0 if what.temperature is None else what.temperature.data_ptr()
        arguments = [0, *rows(x), *rows(out), count, *rotation, temperature, _bits(what.epsilon or 0.0)]
        function = self._engine.function(self._code.emit_heads, form)
        self._add(Operation(function, arguments, units_a_row=count, waits=waits), x, out, what)

    def gated(self, gate: Tensor, up: Tensor, scores: Tensor | None = None, *, waits: bool = True) -> None:
        """silu(gate) * up in the place of the gate, both first multiplied by the score of their row."""
        size = gate.shape[1]
        require(size % LANES == 0)
        of_rows = [_ONE.data_ptr(), 0] if scores is None else [scores.data_ptr(), 4]
        arguments = [0, *rows(gate), *rows(gate), *rows(up), *of_rows, len(gate) // FEW_ROWS]
        function = self._engine.function(self._code.emit_gated)
        operation = Operation(function, arguments, size // LANES, shares=products.SHARES, waits=waits)
        self._add(operation, gate, up, scores)

    def slots(
        self, operands: Sequence[Operand], x: Tensor, out: Tensor, pairs: int, sums: Tensor | None = None
    ) -> Slots:
        """Products of one matrix of each expert. One of x and `out` has a row for each pair, the other for each token;
        with `sums`, a row for each pair, results are added to `out`.
        """
        first = operands[0]
        require(all(other.layout == first.layout and other.shape == first.shape for other in operands))
        prepared = []
        for pair in range(pairs):
            own = slice(pair, pair + 1)
            added = None if sums is None else out[:1]
            x_here, out_here = (x[:1], out[own]) if added is None else (x[own], added)
            part = None if sums is None else sums[own]
            prepared.append(product_arguments(first, x_here, out_here, added=added, sums=part))
        table = torch.tensor([weight_arguments(operand) for operand in operands], dtype=torch.int64)
        ends = (x, None) if sums is None else (None, out)
        self._kept += [*operands, x, out, sums]
        return Slots(first.layout, first.shape[0], torch.tensor(prepared, dtype=torch.int64), table, *ends)

    def choice(self, logits: Tensor, top_k: int, scores: Tensor, matrices: Sequence[Slots]) -> None:
        """Chooses each row's experts by its logits, which are overwritten, and prepares the products of the pairs.

        Scores of pairs (FEW_ROWS * top_k,) are the sigmoids of their logits.
        """
        chosen, chosen_logits = torch.zeros(len(scores), dtype=torch.int64), torch.zeros(len(scores))
        arguments = [*rows(logits), logits.shape[1], top_k, chosen.data_ptr(), chosen_logits.data_ptr()]
        arguments += [scores.data_ptr(), len(matrices), *(word for matrix in matrices for word in matrix.words())]
        function = self._engine.function(self._code.emit_choice)
        self._add(Operation(function, arguments, 1), logits, chosen, chosen_logits, scores)

    def each(self, slots: Slots, top_k: int, *, waits: bool = True) -> None:
        """The products of all pairs."""
        arguments = [self._engine.product(slots.layout), top_k, *rows(slots.arguments)]
        function = self._engine.function(self._code.emit_each)
        shares = products.shares(slots.layout)
        self._add(Operation(function, arguments, slots.units, grain=LANES, shares=shares, waits=waits), slots)

    def _add(self, operation: Operation, *kept: Any) -> None:
        self._operations.append(operation)
        self._kept += kept


def require(condition: bool) -> None:
    """Raises NoCodeError if it does not hold."""
    if not condition:
        raise NoCodeError


_ONE = torch.ones(1)


def _bits(number: float) -> int:
    """Of a float64."""
    return int(struct.unpack("q", struct.pack("d", number))[0])
