"""Emits the functions of a layout: a product with a few rows, and the expansion of rows to a dtype.

Each takes the address of 64-bit integers (see STEPS) and the rows of the matrix to work on, from `first` to `last`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from model.simd.decoders import Row, decode, load_numbers
from model.simd.layouts import LANES, Columns, Layout
from model.simd.vectors import FLOAT, HALF, I16, I32, I64, Value, Vectors

WORD = 8
STEPS, INPUT, INPUT_STRIDE, OUTPUT, OUTPUT_STRIDE, TENSORS = range(6)
"""Places of arguments: steps of a row; addresses and bytes between rows; then an address and stride for each tensor."""

WORKED = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
"""(arguments, first, last)."""

LINE_BYTES, PREFETCH_BYTES = 64, 4096
"""How far ahead memory is asked for: processors' own look-ahead ends with each page. 1.2 to 1.6 times as fast."""

COLUMNS_STEP = 4
"""Rows of a matrix that is stored by columns of the product, that are read at a time."""


class Body:
    """What both functions begin with: their arguments as values, and a loop over the rows."""

    def __init__(self, module: Any, name: str, architecture: str, *, is_exact: bool) -> None:
        self.function = ir.Function(module, WORKED, name)
        builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.v = Vectors(builder, architecture, is_exact=is_exact)
        self.arguments, self.first, self.last = self.function.args

    def argument(self, place: int) -> Value:
        return self.v.load(self.arguments, I64, offset=WORD * place)

    def row_at(self, place: int, number: Value) -> Value:
        """Where a row begins, of what has its address and stride at `place`."""
        return self.v.address(self.argument(place), self.v.b.mul(number, self.argument(place + 1)))

    def rows(self, layout: Layout, work: Callable[[Row], None]) -> None:
        v = self.v

        def row(number: Value) -> None:
            at = []
            for i, shared in enumerate(layout.rows_per_entry):
                entry = v.integer(0) if shared == 0 else v.b.udiv(number, v.integer(shared)) if shared > 1 else number
                at.append(self.row_at(TENSORS + 2 * i, entry))
            work(Row(number, tuple(at)))

        v.loop(self.first, self.last, 1, row)
        v.b.ret_void()


def emit_product(module: Any, name: str, layout: Layout, rows: int, accumulators: int, architecture: str) -> None:
    """out[r, n] = sum over k of x[r, k] * w[n, k], all float32, for `rows` rows r of x.

    Sums are kept in about `accumulators` vectors, so that additions need not wait for each other.
    """
    if isinstance(layout, Columns):
        _emit_product_by_columns(module, name, layout, rows, architecture)
        return
    body = Body(module, name, architecture, is_exact=False)
    v, b = body.v, body.v.b
    kept = max(1, accumulators // rows)
    zero = ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES)
    sums = [[b.alloca(zero.type) for _ in range(kept)] for _ in range(rows)]
    inputs = [body.row_at(INPUT, v.integer(r)) for r in range(rows)]
    steps, used = body.argument(STEPS), max(1, kept * LANES // layout.step)

    def one(row: Row) -> None:
        for sum_ in (s for some in sums for s in some):
            b.store(zero, sum_)

        def add(step: Value, count: int) -> None:
            place = 0
            ahead = v.address(row.at[0], b.add(b.mul(step, v.integer(layout.step_bytes)), v.integer(PREFETCH_BYTES)))
            for line in range(0, layout.step_bytes * count, LINE_BYTES):
                v.prefetch(v.address(ahead, line))
            for i in range(count):
                here = v.address(step, i)
                offset = b.mul(here, v.integer(layout.step * 4))
                for part, weights in enumerate(decode(layout, v, row, here)):
                    for r in range(rows):
                        x = v.load(v.address(inputs[r], offset), FLOAT, LANES, offset=part * LANES * 4)
                        sum_ = sums[r][place % kept]
                        b.store(v.fma(weights, x, b.load(sum_)), sum_)
                    place += 1

        whole = b.sub(steps, b.urem(steps, v.integer(used)))
        v.loop(v.integer(0), whole, used, lambda step: add(step, used))
        if used > 1:
            v.loop(whole, steps, 1, lambda step: add(step, 1))
        for r in range(rows):
            whole_sum = b.load(sums[r][0])
            for sum_ in sums[r][1:]:
                whole_sum = b.fadd(whole_sum, b.load(sum_))
            v.store(v.total(whole_sum), v.address(body.row_at(OUTPUT, v.integer(r)), b.mul(row.number, v.integer(4))))

    body.rows(layout, one)


def _emit_product_by_columns(module: Any, name: str, layout: Columns, rows: int, architecture: str) -> None:
    """The same for weights (C_in, C_out): sums grow in `out`, which a cache holds, while weights stream by.

    Here `first` and `last` are multiples of LANES, and so are STEPS of COLUMNS_STEP.
    """
    body = Body(module, name, architecture, is_exact=False)
    v, b = body.v, body.v.b
    size = layout.numbers.num_bytes
    inputs = [body.row_at(INPUT, v.integer(r)) for r in range(rows)]
    outputs = [body.row_at(OUTPUT, v.integer(r)) for r in range(rows)]
    zero = ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES)

    def clear(n: Value) -> None:
        for out in outputs:
            v.store(zero, v.address(out, b.mul(n, v.integer(4))))

    def add(k: Value) -> None:
        stored = [body.row_at(TENSORS, v.address(k, i)) for i in range(COLUMNS_STEP)]
        at = b.mul(k, v.integer(4))
        x = [
            [v.splat_new(v.load(v.address(x, at), FLOAT, offset=4 * i), FLOAT, LANES) for i in range(COLUMNS_STEP)]
            for x in inputs
        ]

        def along(n: Value) -> None:
            weights = [
                load_numbers(layout.numbers, v, v.address(row, b.mul(n, v.integer(size))), LANES) for row in stored
            ]
            for r, out in enumerate(outputs):
                place = v.address(out, b.mul(n, v.integer(4)))
                sum_ = v.load(place, FLOAT, LANES)
                for factor, weight in zip(x[r], weights, strict=True):
                    sum_ = v.fma(weight, factor, sum_)
                v.store(sum_, place)

        v.loop(body.first, body.last, LANES, along)

    v.loop(body.first, body.last, LANES, clear)
    v.loop(v.integer(0), b.mul(body.argument(STEPS), v.integer(layout.step)), COLUMNS_STEP, add)
    b.ret_void()


def emit_expansion(module: Any, name: str, layout: Layout, dtype: str, architecture: str) -> None:
    """out[n - first of all, k] = w[n, k] rounded to `dtype`. INPUT holds the number of the first row."""
    body = Body(module, name, architecture, is_exact=True)
    v, b = body.v, body.v.b
    steps, start, size = body.argument(STEPS), body.argument(INPUT), 4 if dtype == "float32" else 2

    def one(row: Row) -> None:
        out = body.row_at(OUTPUT, b.sub(row.number, start))

        def write(step: Value) -> None:
            offset = b.mul(step, v.integer(layout.step * size))
            for part, weights in enumerate(decode(layout, v, row, step)):
                v.store(rounded(v, weights, dtype), v.address(v.address(out, offset), part * LANES * size))

        v.loop(v.integer(0), steps, 1, write)

    body.rows(layout, one)


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


def emit_entry(module: Any, name: str, work: str) -> None:
    """What each thread calls: `work` on one share of the rows after the other, until all are taken.

    It gets the address of (arguments, last, share, next). `next` begins as the first row, and threads add to it.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), name)
    v = Vectors(ir.IRBuilder(function.append_basic_block("entry")), "")
    b, task = v.b, function.args[0]
    arguments, last, share = (v.load(task, I64, offset=WORD * i) for i in range(3))
    following = b.inttoptr(v.address(task, 3 * WORD), I64.as_pointer())
    take, go, end = (b.append_basic_block(block) for block in ("take", "go", "end"))
    b.branch(take)
    b.position_at_end(take)
    start = b.atomic_rmw("add", following, share, "monotonic")
    b.cbranch(b.icmp_signed("<", start, last), go, end)
    b.position_at_end(go)
    stop = b.add(start, share)
    b.call(module.globals[work], [arguments, start, b.select(b.icmp_signed("<", stop, last), stop, last)])
    b.branch(take)
    b.position_at_end(end)
    b.ret_void()
