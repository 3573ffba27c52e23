"""Emits what a decoder layer does between its products, for a few rows of float32 numbers; and the walk through a list.

All functions are called as products are: with the address of 64-bit integers, the number of rows, and the units to work
on, from `first` to `last`. Sizes are multiples of LANES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from model.simd import words as w
from model.simd.decoders import load_numbers
from model.simd.functions import WORKED, Body, rounded
from model.simd.layouts import LANES, Numbers
from model.simd.vectors import FLOAT, I64, Value, Vectors


def emit_entry(module: Any, name: str) -> None:
    """What each thread calls with the address of a task: takes shares of one operation after the other."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), name)
    v = Vectors(ir.IRBuilder(function.append_basic_block("entry")), "")
    b, task = v.b, function.args[0]
    operations, count, rows, threads, barrier, counters = (v.load(task, I64, offset=w.WORD * i) for i in range(6))
    zero = v.integer(0)

    def wait() -> None:
        b.call(b.inttoptr(barrier, ir.FunctionType(ir.VoidType(), []).as_pointer()), [])

    def work(number: Value) -> None:
        at = v.address(operations, b.mul(number, v.integer(w.LINE)))
        worked, arguments, units, each, grain, shares, waits = (v.load(at, I64, offset=w.WORD * i) for i in range(7))
        v.when(b.icmp_signed("!=", b.mul(waits, barrier), zero), wait)
        last = b.add(units, b.mul(each, rows))
        parts = b.mul(b.mul(threads, shares), grain)
        share = b.mul(b.udiv(b.sub(b.add(last, parts), v.integer(1)), parts), grain)
        counter = b.inttoptr(v.address(counters, b.mul(number, v.integer(w.LINE))), I64.as_pointer())
        take, go, end = (b.append_basic_block(block) for block in ("take", "go", "end"))
        b.branch(take)
        b.position_at_end(take)
        start = b.atomic_rmw("add", counter, share, "monotonic")
        b.cbranch(b.icmp_signed("<", start, last), go, end)
        b.position_at_end(go)
        stop = b.add(start, share)
        stop = b.select(b.icmp_signed("<", stop, last), stop, last)
        b.call(b.inttoptr(worked, WORKED.as_pointer()), [arguments, rows, start, stop])
        b.branch(take)
        b.position_at_end(end)

    v.loop(zero, count, 1, work)
    b.ret_void()


def emit_norm(module: Any, name: str, numbers: Numbers, architecture: str) -> None:
    """Units are rows: out = x / sqrt(mean of x^2 + EPSILON) * weight, over SIZE numbers. EPSILON is a float64."""
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b
    size, weight, epsilon = (body.argument(place) for place in (w.WEIGHT + 1, w.WEIGHT, w.EPSILON))
    sums = [b.alloca(ir.VectorType(FLOAT, LANES)) for _ in range(2)]

    def row(number: Value) -> None:
        x, out = body.row_at(w.INPUT, number), body.row_at(w.OUTPUT, number)
        for sum_ in sums:
            b.store(ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES), sum_)

        def add(i: Value) -> None:
            for part, sum_ in enumerate(sums):
                values = v.load(v.address(x, b.mul(i, v.integer(4))), FLOAT, LANES, offset=4 * LANES * part)
                b.store(v.fma(values, values, b.load(sum_)), sum_)

        def write(i: Value) -> None:
            place = b.mul(i, v.integer(4))
            values = v.load(v.address(x, place), FLOAT, LANES)
            factors = load_numbers(numbers, v, v.address(weight, b.mul(i, v.integer(numbers.num_bytes))), LANES)
            v.store(b.fmul(b.fmul(values, v.splat(factor, values)), factors), v.address(out, place))

        v.loop(v.integer(0), size, 2 * LANES, add)
        factor = _inverse_root(v, v.total(b.fadd(*(b.load(sum_) for sum_ in sums))), size, epsilon)
        v.loop(v.integer(0), size, LANES, write)

    v.loop(body.first, body.last, 1, row)
    b.ret_void()


def _inverse_root(v: Vectors, squares: Value, size: Value, epsilon: Value) -> Value:
    """1 / sqrt(squares / size + epsilon)."""
    added = v.b.fptrunc(v.b.bitcast(epsilon, ir.DoubleType()), FLOAT)
    mean = v.b.fadd(v.b.fdiv(squares, v.b.uitofp(size, FLOAT)), added)
    return v.b.fdiv(ir.Constant(FLOAT, 1.0), v.call("llvm.sqrt.f32", FLOAT, [mean]))


@dataclass(frozen=True)
class HeadsForm:
    """What is done to projections' heads before attention, and the dtype in which they are stored."""

    head_dim: int
    dtype: str
    rotates: bool = False
    norms: bool = False
    scales: bool = False


def emit_heads(module: Any, name: str, what: HeadsForm, architecture: str) -> None:
    """Units are the heads of all rows, HEADS in each: rotary embedding over interleaved pairs, norm, temperature.

    Rotations are (rows, head_dim / 2) complex numbers of float32; temperatures are (rows,) float32; the epsilon is a
    float64.
    """
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b
    heads, temperature, epsilon = (body.argument(place) for place in (w.HEADS, w.TEMPERATURE, w.HEADS_EPSILON))
    count, width = what.head_dim // LANES, what.head_dim * (4 if what.dtype == "float32" else 2)

    def unit(number: Value) -> None:
        row, head = b.udiv(number, heads), b.urem(number, heads)
        at = v.address(body.row_at(w.INPUT, row), b.mul(head, v.integer(4 * what.head_dim)))
        parts = [v.load(at, FLOAT, LANES, offset=4 * LANES * part) for part in range(count)]
        if what.rotates:
            phases = body.row_at(w.ROTATION, row)
            parts = [
                _rotated(v, part, v.load(phases, FLOAT, LANES, offset=4 * LANES * i)) for i, part in enumerate(parts)
            ]
        if what.norms:
            squares = b.fmul(parts[0], parts[0])
            for part in parts[1:]:
                squares = v.fma(part, part, squares)
            factor = _inverse_root(v, v.total(squares), v.integer(what.head_dim), epsilon)
            parts = [b.fmul(part, v.splat(factor, part)) for part in parts]
        if what.scales:
            factor = v.load(v.address(temperature, b.mul(row, v.integer(4))), FLOAT)
            parts = [b.fmul(part, v.splat(factor, part)) for part in parts]
        out = v.address(body.row_at(w.OUTPUT, row), b.mul(head, v.integer(width)))
        for i, part in enumerate(parts):
            v.store(rounded(v, part, what.dtype), v.address(out, width // count * i))

    v.loop(body.first, body.last, 1, unit)
    b.ret_void()


def _rotated(v: Vectors, x: Value, phases: Value) -> Value:
    """Pairs of x times complex numbers."""
    evens = [lane // 2 * 2 for lane in range(LANES)]
    real, imaginary = v.shuffle(phases, phases, evens), v.shuffle(phases, phases, [lane + 1 for lane in evens])
    signs = v.constant([-1.0, 1.0] * (LANES // 2), FLOAT)
    turned = v.b.fmul(v.shuffle(x, x, [lane ^ 1 for lane in range(LANES)]), signs)
    return v.fma(turned, imaginary, v.b.fmul(x, real))


def emit_gated(module: Any, name: str, architecture: str) -> None:
    """Units are columns, in vectors: out = silu(score * gate) * (score * up), in COPIES times as many rows.

    The scores are those of rows, SCORES_STEP bytes apart. INPUT is the gate.
    """
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b

    def row(number: Value) -> None:
        gates, ups, outs = (body.row_at(place, number) for place in (w.INPUT, w.UP, w.OUTPUT))
        score = v.load(v.address(body.argument(w.SCORES), b.mul(number, body.argument(w.SCORES_STEP))), FLOAT)

        def along(unit: Value) -> None:
            place = b.mul(unit, v.integer(4 * LANES))
            gate, up = (v.load(v.address(at, place), FLOAT, LANES) for at in (gates, ups))
            gate, up = (b.fmul(x, v.splat(score, x)) for x in (gate, up))
            divisor = b.fadd(v.splat(1.0, gate), v.exponential(b.fneg(gate)))
            v.store(b.fmul(b.fdiv(gate, divisor), up), v.address(outs, place))

        v.loop(body.first, body.last, 1, along)

    v.loop(v.integer(0), b.mul(body.num_rows, body.argument(w.COPIES)), 1, row)
    b.ret_void()


def emit_each(module: Any, name: str, architecture: str) -> None:
    """Calls one function CALLS times a row, for one row and the same units, each time with the next arguments."""
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b
    function = b.inttoptr(body.argument(w.CALLED), WORKED.as_pointer())

    def call(number: Value) -> None:
        arguments = body.row_at(w.CALLED_WITH, number)
        b.call(function, [arguments, v.integer(1), body.first, body.last])

    v.loop(v.integer(0), b.mul(body.num_rows, body.argument(w.CALLS)), 1, call)
    b.ret_void()


def emit_choice(module: Any, name: str, architecture: str) -> None:
    """One unit: chooses each row's TOP_K experts by their logits, which it overwrites; the first of equal ones.

    The pairs of rows and experts are sorted by expert, so that an expert's weights are read once. The score of each,
    the sigmoid of its logit, goes to EXPERT_SCORES. Then arguments of products are prepared, one matrix (MATRIX_WORDS)
    after the other: in the slot of each pair, its expert's entry of the table is written from FACTOR on, and the row's
    address as INPUT, or as OUTPUT and ADDED, unless TOKENS_IN or TOKENS_OUT is 0.
    """
    body = Body(module, name, architecture)
    v, b = body.v, body.v.b
    experts, top_k, chosen, logits_of = (
        body.argument(place) for place in (w.EXPERTS, w.TOP_K, w.CHOSEN, w.CHOSEN_LOGITS)
    )
    pairs, position = b.mul(body.num_rows, top_k), b.alloca(I64)
    best, best_logit = b.alloca(I64), b.alloca(FLOAT)

    def word(at: Value, number: Value | int) -> Value:
        return v.address(at, b.mul(v.integer(number), v.integer(w.WORD)))

    def number_at(at: Value, number: Value) -> Value:
        return v.address(at, b.mul(number, v.integer(4)))

    def choose(pair: Value) -> None:
        logits = body.row_at(w.LOGITS, b.udiv(pair, top_k))
        b.store(v.integer(0), best)
        b.store(v.load(logits, FLOAT), best_logit)

        def compare(expert: Value) -> None:
            logit = v.load(number_at(logits, expert), FLOAT)
            is_larger = b.fcmp_ordered(">", logit, b.load(best_logit))
            b.store(b.select(is_larger, expert, b.load(best)), best)
            b.store(b.select(is_larger, logit, b.load(best_logit)), best_logit)

        v.loop(v.integer(1), experts, 1, compare)
        v.store(b.load(best), word(chosen, pair))
        v.store(b.load(best_logit), number_at(logits_of, pair))
        v.store(ir.Constant(FLOAT, float("-inf")), number_at(logits, b.load(best)))

    def prepare(pair: Value, expert: Value) -> None:
        place, row = b.load(position), b.udiv(pair, top_k)
        logit = v.splat_new(v.load(number_at(logits_of, pair), FLOAT), FLOAT, LANES)
        score = b.fdiv(v.splat(1.0, logit), b.fadd(v.splat(1.0, logit), v.exponential(b.fneg(logit))))
        v.store(v.lane(score, 0), number_at(body.argument(w.EXPERT_SCORES), place))

        def fill(matrix: Value) -> None:
            at = v.address(word(body.arguments, w.MATRIX), b.mul(matrix, v.integer(w.MATRIX_WORDS * w.WORD)))
            fields = [v.load(at, I64, offset=w.WORD * i) for i in range(w.MATRIX_WORDS)]
            slot = v.address(fields[w.SLOTS], b.mul(place, fields[w.SLOT_STRIDE]))
            entry = v.address(fields[w.TABLE], b.mul(expert, b.mul(fields[w.TABLE_WORDS], v.integer(w.WORD))))

            def copy(i: Value) -> None:
                v.store(v.load(word(entry, i), I64), word(word(slot, w.FACTOR), i))

            v.loop(v.integer(0), fields[w.TABLE_WORDS], 1, copy)
            for base, stride, targets in (
                (w.TOKENS_IN, w.TOKENS_IN_STRIDE, (w.INPUT,)),
                (w.TOKENS_OUT, w.TOKENS_OUT_STRIDE, (w.OUTPUT, w.ADDED)),
            ):
                address = v.address(fields[base], b.mul(row, fields[stride]))

                def write(address: Value = address, targets: tuple[int, ...] = targets) -> None:
                    for target in targets:
                        v.store(address, word(slot, target))

                v.when(b.icmp_signed("!=", fields[base], v.integer(0)), write)

        v.loop(v.integer(0), body.argument(w.MATRICES), 1, fill)
        b.store(b.add(place, v.integer(1)), position)

    def gather(expert: Value) -> None:
        def compare(pair: Value) -> None:
            is_this = b.icmp_signed("==", v.load(word(chosen, pair), I64), expert)
            v.when(is_this, lambda: prepare(pair, expert))

        v.loop(v.integer(0), pairs, 1, compare)

    v.loop(v.integer(0), pairs, 1, choose)
    b.store(v.integer(0), position)
    v.loop(v.integer(0), experts, 1, gather)
    b.ret_void()
