"""Emits attention of a few queries to keys and values in their stored forms: one pass, every key and value read once.

Work is cut into units: one range of keys of one KV head, for all queries of that head. Each has a state of its own
(outputs, largest score, sum of weights: https://arxiv.org/abs/1805.02867), and whoever ends a head's last unit merges
its states, oldest keys first. So results do not depend on the number of threads, on how segments are spread over calls,
or, for a query, on the other queries.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from model.simd.attention_blocks import Blocks
from model.simd.attention_form import INPUT, LSE, OUTPUT, Argument, AttentionForm, Record
from model.simd.attention_integers import IntegerBlocks
from model.simd.attention_states import LOWEST, Emitter, exp2
from model.simd.layouts import Numbers
from model.simd.vectors import FLOAT, I16, I64, Value
from model.simd.words import WORD

LN_2 = 0.6931471805599453


def emit_preparation(module: Any, name: str, form: AttentionForm, architecture: str) -> None:
    """Queries times the scores' scale as float32, their positions, and totals of no key, in one thread."""
    e = Emitter(module, name, form, architecture)
    v, b = e.v, e.b
    scale = b.fptrunc(v.load(e.arguments, ir.DoubleType(), offset=WORD * Argument.SCALE), FLOAT)
    factor = e.as_vector(scale)
    padded, queries = e.argument(Argument.PADDED), e.argument(Argument.QUERIES)
    is_first = b.icmp_signed("!=", e.argument(Argument.IS_FIRST), v.integer(0))
    size = Numbers(form.queries).num_bytes

    def natural(address: Value, part: int) -> Value:
        offset = size * form.lanes * part
        if form.queries == "float32":
            return v.load(address, FLOAT, form.lanes, offset=offset)
        bits = v.load(address, I16, form.lanes, offset=offset)
        return v.from_half(bits) if form.queries == "float16" else v.from_bfloat16(bits)

    def of_head(head: Value) -> None:
        total = v.address(e.argument(Argument.TOTALS), b.mul(head, e.argument(Argument.STATE_BYTES)))
        v.store(v.integer(0), v.address(e.argument(Argument.DONE), e.times(head, WORD)))

        def of_query(number: Value) -> None:
            real = b.select(b.icmp_signed("<", number, queries), number, v.integer(0))
            row, query_head, token = e.query(head, real)
            source = e.strided(INPUT, (row, query_head, token))
            row_number = b.add(b.mul(head, padded), number)
            target = v.address(e.argument(Argument.PREPARED), e.times(row_number, 4 * form.head_dim))
            for part in range(0, e.parts, e.at_once):
                vectors = e.as_read([natural(source, part + i) for i in range(e.at_once)])
                for i, vector in enumerate(vectors):
                    v.store(b.fmul(vector, factor), v.address(target, 4 * form.lanes * (part + i)))
            with b.if_then(is_first):
                e.clear(total, number)
            seen = b.add(b.add(token, e.argument(Argument.FIRST)), v.integer(1))
            v.store(seen, v.address(e.argument(Argument.POSITIONS), e.times(number, WORD)))

        e.loop(0, padded, 1, of_query)

    e.loop(0, e.argument(Argument.UNIT_HEADS), 1, of_head)
    b.ret_void()


def emit_attention(module: Any, name: str, form: AttentionForm, architecture: str) -> None:
    """What each thread calls: takes one unit after the other, ranges of keys, each for one KV head after the other."""
    e = Emitter(module, name, form, architecture)
    v, b = e.v, e.b
    range_work = (IntegerBlocks if form.is_integral else Blocks)(e)
    heads = e.argument(Argument.UNIT_HEADS)

    def unit(number: Value) -> None:
        head, of_all = b.urem(number, heads), b.udiv(number, heads)
        state = v.address(e.argument(Argument.STATES), b.mul(number, e.argument(Argument.STATE_BYTES)))
        segment, first, stop = _range_at(e, of_all)
        with b.if_then(b.icmp_signed("<", first, stop)):
            range_work.emit(head, segment, first, stop, state)
        counter = b.inttoptr(v.address(e.argument(Argument.DONE), e.times(head, WORD)), I64.as_pointer())
        done = b.atomic_rmw("add", counter, v.integer(1), "acq_rel")
        with b.if_then(b.icmp_signed("==", b.add(done, v.integer(1)), e.argument(Argument.RANGES))):
            b.store(v.integer(0), counter)
            _emit_merge(e, head)

    units = b.mul(e.argument(Argument.RANGES), heads)
    following = b.inttoptr(v.address(e.arguments, WORD * Argument.NEXT), I64.as_pointer())
    take, go, end = (b.append_basic_block(block) for block in ("take", "go", "end"))
    b.branch(take)
    b.position_at_end(take)
    number = b.atomic_rmw("add", following, v.integer(1), "monotonic")
    b.cbranch(b.icmp_signed("<", number, units), go, end)
    b.position_at_end(go)
    unit(number)
    b.branch(take)
    b.position_at_end(end)
    b.ret_void()


def _range_at(e: Emitter, number: Value) -> tuple[Value, Value, Value]:
    """The record of one of the call's ranges, and its keys in the segment, from first to stop."""
    number = e.b.add(number, e.argument(Argument.FIRST_RANGE))
    v, b, each, keys = e.v, e.b, e.argument(Argument.SEGMENT_RANGES), e.argument(Argument.RANGE_KEYS)
    segment = v.address(e.argument(Argument.TABLE), e.times(b.udiv(number, each), WORD * Record.COUNT))
    first = b.mul(b.urem(number, each), keys)
    length, stop = v.load(segment, I64, offset=WORD * Record.LENGTH), b.add(first, keys)
    return segment, first, b.select(b.icmp_signed("<", stop, length), stop, length)


def _emit_merge(e: Emitter, head: Value) -> None:
    """Adds a head's states, oldest first, to its total, and writes outputs and log-sum-exp of that.

    Totals hold elements in their own order, so that segments in other forms can be added.
    """
    v, b, form = e.v, e.b, e.form
    total = v.address(e.argument(Argument.TOTALS), b.mul(head, e.argument(Argument.STATE_BYTES)))
    lowest, vector_bytes = ir.Constant(FLOAT, LOWEST), 4 * form.lanes

    def of_query(number: Value) -> None:
        largest_at, sum_at = (e.floats_at(total, number, past_outputs=n) for n in (1, 2))
        outputs = e.floats_at(total, number)

        def add(of_all: Value) -> None:
            _, first, stop = _range_at(e, of_all)
            with b.if_then(b.icmp_signed("<", first, stop)):
                place = b.add(b.mul(of_all, e.argument(Argument.UNIT_HEADS)), head)
                state = v.address(e.argument(Argument.STATES), b.mul(place, e.argument(Argument.STATE_BYTES)))
                old, new = v.load(largest_at, FLOAT), v.load(e.floats_at(state, number, past_outputs=1), FLOAT)
                largest = e.larger(new, old)
                base = e.as_vector(e.larger(largest, lowest))
                factors = [exp2(v, b.fsub(e.as_vector(x), base)) for x in (old, new)]
                sums = [v.load(sum_at, FLOAT), v.load(e.floats_at(state, number, past_outputs=2), FLOAT)]
                scaled = [b.fmul(x, v.lane(factor, 0)) for x, factor in zip(sums, factors, strict=True)]
                v.store(b.fadd(*scaled), sum_at)
                v.store(largest, largest_at)
                found = e.floats_at(state, number)
                for part in range(0, e.parts, e.added_at_once):
                    offsets = [vector_bytes * (part + i) for i in range(e.added_at_once)]
                    others = e.in_order([v.load(found, FLOAT, form.lanes, offset=offset) for offset in offsets])
                    for offset, other in zip(offsets, others, strict=True):
                        here = v.address(outputs, offset)
                        kept = b.fmul(v.load(here, FLOAT, form.lanes), factors[0])
                        v.store(v.fma(other, factors[1], kept), here)

        e.loop(0, e.argument(Argument.RANGES), 1, add)
        numbers = e.query(head, number)
        sum_ = v.load(sum_at, FLOAT)
        is_seen = b.fcmp_unordered("!=", sum_, ir.Constant(FLOAT, 0.0))
        inverse = b.select(is_seen, b.fdiv(ir.Constant(FLOAT, 1.0), sum_), sum_)
        target = e.strided(OUTPUT, numbers)
        for part in range(e.parts):
            vector = v.load(outputs, FLOAT, form.lanes, offset=vector_bytes * part)
            v.store(b.fmul(vector, e.as_vector(inverse)), v.address(target, vector_bytes * part))
        logarithm = v.call("llvm.log2.f32", FLOAT, [sum_])
        lse = b.fmul(b.fadd(v.load(largest_at, FLOAT), logarithm), ir.Constant(FLOAT, LN_2))
        lse = b.select(is_seen, lse, ir.Constant(FLOAT, float("-inf")))
        v.store(lse, e.strided(LSE, numbers))

    e.loop(0, e.argument(Argument.QUERIES), 1, of_query)
