"""Emits the functions of a layout: a product with a few rows, and the expansion of rows to a dtype.

Each takes the address of 64-bit integers (see `model.simd.words`), the number of rows of the input, and the units to
work on, from `first` to `last`: here rows of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from model.simd import words as w
from model.simd.decoders import Row, decode, load_numbers
from model.simd.layouts import LANES, Columns, Layout
from model.simd.vectors import FLOAT, HALF, I16, I32, I64, Value, Vectors

WORKED = ir.FunctionType(ir.VoidType(), [I64, I64, I64, I64])
"""(arguments, rows, first, last)."""

LINE_BYTES, PREFETCH_BYTES = 64, 4096
"""How far ahead memory is asked for: processors' own look-ahead ends with each page. 1.2 to 1.6 times as fast."""

COLUMNS_STEP = 4
"""Rows of a matrix that is stored by columns of the product, that are read at a time."""


class Body:
    """What functions begin with: their arguments as values, and a loop over the rows of the matrix."""

    def __init__(self, module: Any, name: str, architecture: str, *, is_exact: bool = False) -> None:
        self.function = ir.Function(module, WORKED, name)
        builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.v = Vectors(builder, architecture, is_exact=is_exact)
        self.arguments, self.num_rows, self.first, self.last = self.function.args

    def argument(self, place: int) -> Value:
        return self.v.load(self.arguments, I64, offset=w.WORD * place)

    def row_at(self, place: int, number: Value) -> Value:
        """Where a row begins, of what has its address and stride at `place`."""
        return self.v.address(self.argument(place), self.v.b.mul(number, self.argument(place + 1)))

    def rows(self, layout: Layout, work: Callable[[Row], None], start: Value | int = 0) -> None:
        """A loop over rows of the matrix; unit 0 is row number `start`."""
        v = self.v

        def row(unit: Value) -> None:
            number, at = v.address(unit, start), []
            for i, shared in enumerate(layout.rows_per_entry):
                entry = v.integer(0) if shared == 0 else v.b.udiv(number, v.integer(shared)) if shared > 1 else number
                at.append(self.row_at(w.TENSORS + 2 * i, entry))
            work(Row(number, tuple(at)))

        v.loop(self.first, self.last, 1, row)
        v.b.ret_void()

    def groups(self, most: int, work: Callable[[Value, int], None]) -> None:
        """The input's rows in groups of `most` of them, a power of two, then half as many, and so on.

        `work` gets a group's first row and how many there are.
        """
        v, start, count = self.v, self.v.integer(0), most
        while count:
            stop = v.b.and_(self.num_rows, v.integer(-count)) if count > 1 else self.num_rows
            v.loop(start, stop, count, lambda r, count=count: work(r, count))  # type: ignore[misc]
            start, count = stop, count // 2

    def write(self, row: Value, number: Value, total: Value) -> None:
        """Stores one of a product's sums, of a row of the input and a row of the matrix."""
        v, b = self.v, self.v.b

        def entry(place: int, *, step: int) -> Value:
            return v.address(self.argument(place), b.mul(number, self.argument(step)))

        out = b.fmul(total, v.load(entry(w.FACTOR, step=w.FACTOR_STEP), FLOAT))
        out = b.fadd(out, v.load(entry(w.BIAS, step=w.BIAS_STEP), FLOAT))
        added = v.address(entry(w.ADDED, step=w.ADDED_STEP), b.mul(row, self.argument(w.ADDED_STRIDE)))
        v.store(b.fadd(out, v.load(added, FLOAT)), v.address(self.row_at(w.OUTPUT, row), b.mul(number, v.integer(4))))


def emit_product(module: Any, name: str, layout: Layout, most_rows: int, accumulators: int, architecture: str) -> None:
    """out[r, n] = factor[n] * (sum over k of x[r, k] * w[n, k]) + bias[n] + added[r, n], all float32.

    Rows r of x are computed in groups of at most `most_rows`, a power of two, so that sums stay in registers, each sum
    in `accumulators` vectors, so that additions need not wait for each other. A row's sums are added in the same order
    in any group: its result does not depend on the others.
    """
    if isinstance(layout, Columns):
        _emit_product_by_columns(module, name, layout, most_rows, architecture)
        return
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b
    zero = ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES)
    sums = [[b.alloca(zero.type) for _ in range(accumulators)] for _ in range(most_rows)]
    steps, used = body.argument(w.STEPS), max(1, accumulators * LANES // layout.step)
    whole = b.sub(steps, b.urem(steps, v.integer(used)))

    def group(row: Row, start: Value, count: int) -> None:
        inputs = [body.row_at(w.INPUT, v.address(start, r)) for r in range(count)]
        for sum_ in (s for some in sums[:count] for s in some):
            b.store(zero, sum_)

        def add(step: Value, several: int) -> None:
            place = 0
            ahead = v.address(row.at[0], b.add(b.mul(step, v.integer(layout.step_bytes)), v.integer(PREFETCH_BYTES)))
            for line in range(0, layout.step_bytes * several, LINE_BYTES):
                v.prefetch(v.address(ahead, line))
            for i in range(several):
                here = v.address(step, i)
                offset = b.mul(here, v.integer(layout.step * 4))
                for part, weights in enumerate(decode(layout, v, row, here)):
                    for r in range(count):
                        x = v.load(v.address(inputs[r], offset), FLOAT, LANES, offset=part * LANES * 4)
                        sum_ = sums[r][place % accumulators]
                        b.store(v.fma(weights, x, b.load(sum_)), sum_)
                    place += 1

        v.loop(v.integer(0), whole, used, lambda step: add(step, used))
        if used > 1:
            v.loop(whole, steps, 1, lambda step: add(step, 1))
        for r in range(count):
            whole_sum = b.load(sums[r][0])
            for sum_ in sums[r][1:]:
                whole_sum = b.fadd(whole_sum, b.load(sum_))
            body.write(v.address(start, r), row.number, v.total(whole_sum))

    body.rows(layout, lambda row: body.groups(most_rows, lambda start, count: group(row, start, count)))


def _emit_product_by_columns(module: Any, name: str, layout: Columns, most_rows: int, architecture: str) -> None:
    """The same for weights (C_in, C_out): sums grow in memory, which a cache holds, while weights stream by.

    Here `first` and `last` are multiples of LANES, and so are STEPS of COLUMNS_STEP.
    """
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b
    size = layout.numbers.num_bytes
    zero = ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES)

    def each_row(work: Callable[[Value], None]) -> None:
        v.loop(v.integer(0), body.num_rows, 1, work)

    def clear(row: Value) -> None:
        sums = body.row_at(w.SUMS, row)
        v.loop(body.first, body.last, LANES, lambda n: v.store(zero, v.address(sums, b.mul(n, v.integer(4)))))

    def add(k: Value) -> None:
        stored = [body.row_at(w.TENSORS, v.address(k, i)) for i in range(COLUMNS_STEP)]

        def group(start: Value, count: int) -> None:
            rows = [v.address(start, r) for r in range(count)]
            inputs = [v.address(body.row_at(w.INPUT, row), b.mul(k, v.integer(4))) for row in rows]
            sums = [body.row_at(w.SUMS, row) for row in rows]
            x = [
                [v.splat_new(v.load(at, FLOAT, offset=4 * i), FLOAT, LANES) for i in range(COLUMNS_STEP)]
                for at in inputs
            ]

            def along(n: Value) -> None:
                weights = [
                    load_numbers(layout.numbers, v, v.address(row, b.mul(n, v.integer(size))), LANES) for row in stored
                ]
                for r, at in enumerate(sums):
                    place = v.address(at, b.mul(n, v.integer(4)))
                    sum_ = v.load(place, FLOAT, LANES)
                    for factor, weight in zip(x[r], weights, strict=True):
                        sum_ = v.fma(weight, factor, sum_)
                    v.store(sum_, place)

            v.loop(body.first, body.last, LANES, along)

        body.groups(min(most_rows, 4), group)

    def finish(row: Value) -> None:
        sums = body.row_at(w.SUMS, row)

        def one(n: Value) -> None:
            body.write(row, n, v.load(v.address(sums, b.mul(n, v.integer(4))), FLOAT))

        v.loop(body.first, body.last, 1, one)

    each_row(clear)
    v.loop(v.integer(0), b.mul(body.argument(w.STEPS), v.integer(layout.step)), COLUMNS_STEP, add)
    each_row(finish)
    b.ret_void()


def emit_expansion(module: Any, name: str, layout: Layout, dtype: str, architecture: str) -> None:
    """out[n - start, k] = w[n, k] rounded to `dtype`, for n from `start` on, which is the argument INPUT."""
    body = Body(module, name, architecture, is_exact=True)
    v, b = body.v, body.v.b
    steps, start, size = body.argument(w.STEPS), body.argument(w.INPUT), 4 if dtype == "float32" else 2

    def one(row: Row) -> None:
        out = body.row_at(w.OUTPUT, b.sub(row.number, start))

        def write(step: Value) -> None:
            offset = b.mul(step, v.integer(layout.step * size))
            for part, weights in enumerate(decode(layout, v, row, step)):
                v.store(rounded(v, weights, dtype), v.address(v.address(out, offset), part * LANES * size))

        v.loop(v.integer(0), steps, 1, write)

    body.rows(layout, one, start)


def rounded(v: Vectors, values: Value, dtype: str) -> Value:
    """float32 vectors as what is stored of them: to nearest, ties to even."""
    if dtype == "float32":
        return values
    count = values.type.count
    if dtype == "float16":
        return v.b.fptrunc(values, ir.VectorType(HALF, count))
    bits = v.b.bitcast(values, ir.VectorType(I32, count))
    up = v.b.add(v.bits(v.bits(bits, 0xFFFF, -16), 1), v.splat(0x7FFF, bits))
    return v.b.trunc(v.bits(v.b.add(bits, up), 0xFFFF, -16), ir.VectorType(I16, count))
