"""Emits attention to one range of keys, in blocks: products with the keys, weights, and the sum of the values."""

from __future__ import annotations

import functools

from llvmlite import ir

from model.simd.attention_form import MOST_BLOCK, Argument, Record
from model.simd.attention_states import LOWEST, Emitter, exp2
from model.simd.decoders import FLOAT8_FACTOR
from model.simd.functions import LINE_BYTES
from model.simd.vectors import FLOAT, I32, I64, Value, Vectors
from model.simd.words import WORD

KEY_ROWS = 4
"""Keys that are multiplied at a time: what one vector register of four sums holds."""


class Blocks:
    """One range of keys of one KV head, block by block, and each block for one tile of queries after the other."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.form = e, e.form
        lanes = e.form.lanes
        self.scores = e.local(FLOAT, e.form.tile * MOST_BLOCK)
        self.factors = e.local(e.vector, e.form.tile)
        self.scaled = e.local(e.vector, e.form.tile * e.parts) if e.form.has_scales else None
        self.value_scales = e.local(FLOAT, MOST_BLOCK) if e.form.has_scales else None
        self.columns = max(e.added_at_once, min(e.parts, 20 // e.form.tile if lanes == 16 else 8 // e.form.tile))
        while e.parts % self.columns or self.columns % e.added_at_once:
            self.columns -= 1
        self.outputs = [[e.b.alloca(e.vector) for _ in range(self.columns)] for _ in range(e.form.tile)]

    def emit(self, head: Value, segment: Value, first: Value, stop: Value, state: Value) -> None:
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        heads, padded, block = (e.argument(a) for a in (Argument.HEADS, Argument.PADDED, Argument.BLOCK))
        at = (b.udiv(head, heads), b.urem(head, heads))
        start = v.load(segment, I64, offset=WORD * Record.START)
        queries = v.address(e.argument(Argument.PREPARED), e.times(b.mul(head, padded), 4 * form.head_dim))

        e.loop(0, padded, 1, lambda number: e.clear(state, number))
        blocks = b.udiv(b.add(b.sub(stop, first), b.sub(block, v.integer(1))), block)

        next_block = e.times(block, form.row_bytes)  # processors' own look-ahead ends with each page

        def one_block(number: Value) -> None:
            begin = b.add(first, b.mul(number, block))
            left = b.sub(stop, begin)
            count = b.select(b.icmp_signed("<", left, block), left, block)
            key_scales = None
            if form.has_scales:
                key_scales = e.strided(Record.KEY_SCALES, (*at, b.udiv(begin, block)), segment)

                self.copy_value_scales(e.strided(Record.VALUE_SCALES, (*at, begin), segment), segment, count)
            seen = b.add(start, begin)  # position of the block's first key
            end = v.address(seen, MOST_BLOCK)
            is_later = b.icmp_signed(">", end, v.address(e.argument(Argument.FIRST), 1))
            is_hidden = b.or_(is_later, b.icmp_signed("<", count, v.integer(MOST_BLOCK)))

            def one_tile(tile: Value) -> None:
                rows = v.address(queries, e.times(tile, 4 * form.head_dim))
                if key_scales is not None:
                    rows = self.scale(rows, key_scales)
                ahead = b.select(b.icmp_signed("==", tile, v.integer(0)), next_block, v.integer(0))
                keys = e.strided(Record.KEYS, (*at, begin), segment)
                values = e.strided(Record.VALUES, (*at, begin), segment)
                self.multiply(rows, keys, v.load(segment, I64, offset=WORD * (Record.KEYS + 3)), count, ahead)
                with b.if_then(is_hidden):
                    self.hide(tile, seen, count)
                self.weigh(state, tile)
                self.add(state, tile, values, v.load(segment, I64, offset=WORD * (Record.VALUES + 3)), count, ahead)

            e.loop(0, padded, form.tile, one_tile)

        e.loop(0, blocks, 1, one_block)

    def copy_value_scales(self, scales: Value, segment: Value, count: Value) -> None:
        """A block's; behind the last key its scale once more, which is a number."""
        e, b, v = self.e, self.e.b, self.e.v
        stride = v.load(segment, I64, offset=WORD * (Record.VALUE_SCALES + 3))
        last = b.sub(count, v.integer(1))
        is_whole = b.icmp_signed("==", count, v.integer(MOST_BLOCK))
        is_dense = b.and_(is_whole, b.icmp_signed("==", stride, v.integer(4)))

        def copy(key: Value) -> None:
            number = b.select(b.icmp_signed("<", key, last), key, last)
            v.store(
                v.load(v.address(scales, b.mul(number, stride)), FLOAT), v.address(self.value_scales, e.times(key, 4))
            )

        with b.if_else(is_dense) as (dense, sparse):
            with dense:
                for start in range(0, 4 * MOST_BLOCK, 4 * self.form.lanes):
                    scale = v.load(scales, FLOAT, self.form.lanes, offset=start)
                    v.store(scale, v.address(self.value_scales, start))
            with sparse:
                e.loop(0, MOST_BLOCK, 1, copy)

    def scale(self, rows: Value, key_scales: Value) -> Value:
        """A tile of queries times the scales of a group's channels, on the stack."""
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        for part in range(e.parts):
            scale = v.load(key_scales, FLOAT, form.lanes, offset=4 * form.lanes * part)
            if form.stored == "float8_e4m3fn":
                scale = b.fmul(scale, v.splat(FLOAT8_FACTOR, scale))
            for query in range(form.tile):
                offset = 4 * (query * form.head_dim + part * form.lanes)
                v.store(b.fmul(v.load(rows, FLOAT, form.lanes, offset=offset), scale), v.address(self.scaled, offset))
        return self.scaled

    def multiply(self, rows: Value, keys: Value, stride: Value, count: Value, ahead: Value) -> None:
        """The scores of a tile with a block's keys. Rows past the last key are the last key once more."""
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        last = b.sub(count, v.integer(1))

        def four(key: Value) -> None:
            addresses = self.key_addresses(keys, stride, key, last, ahead)
            sums = [[e.zero] * KEY_ROWS for _ in range(form.tile)]
            for part in range(0, e.parts, e.at_once):
                stored = [e.read(address, part) for address in addresses]
                for i in range(e.at_once):
                    for query in range(form.tile):
                        place = query * form.head_dim + (part + i) * form.lanes
                        x = v.load(rows, FLOAT, form.lanes, offset=4 * place)
                        for row in range(KEY_ROWS):
                            sums[query][row] = v.fma(stored[row][i], x, sums[query][row])
            for query in range(form.tile):
                target = v.address(self.scores, b.add(e.times(key, 4), v.integer(4 * MOST_BLOCK * query)))
                v.store(totals(v, sums[query]), target)

        e.loop(0, count, KEY_ROWS, four)

    def key_addresses(self, keys: Value, stride: Value, key: Value, last: Value, ahead: Value) -> list[Value]:
        """Of the rows from `key` on; asks for what lies `ahead` of them."""
        b, v = self.e.b, self.e.v
        numbers = [v.address(key, i) for i in range(KEY_ROWS)]
        numbers = [b.select(b.icmp_signed("<", number, last), number, last) for number in numbers]
        addresses = [v.address(keys, b.mul(number, stride)) for number in numbers]
        following = v.address(addresses[0], ahead)
        for line in range(0, KEY_ROWS * self.form.row_bytes, LINE_BYTES):
            v.prefetch(v.address(following, line))
        return addresses

    def hide(self, tile: Value, seen: Value, count: Value) -> None:
        """Scores of keys that a query does not see, and what lies behind the block's last one, become -inf."""
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        places = v.constant(list(range(form.lanes)), I32)
        for query in range(form.tile):
            place = v.address(e.argument(Argument.POSITIONS), e.times(v.address(tile, query), WORD))
            visible = b.sub(v.load(place, I64), seen)
            limit = b.trunc(b.select(b.icmp_signed("<", visible, count), visible, count), I32)
            limits = v.splat_new(limit, I32, form.lanes)

            def hide(key: Value, query: int = query, limits: Value = limits) -> None:
                here = v.address(self.scores, b.add(e.times(key, 4), v.integer(4 * MOST_BLOCK * query)))
                is_seen = b.icmp_signed("<", b.add(v.splat_new(b.trunc(key, I32), I32, form.lanes), places), limits)
                v.store(b.select(is_seen, v.load(here, FLOAT, form.lanes), v.splat(float("-inf"), e.zero)), here)

            e.loop(0, MOST_BLOCK, form.lanes, hide)

    def weigh(self, state: Value, tile: Value) -> None:
        """Scores become weights, relative to the largest score so far; sums and factors for what was added before."""
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        starts = range(0, MOST_BLOCK, form.lanes)
        places = [[4 * (MOST_BLOCK * query + start) for start in starts] for query in range(form.tile)]
        largest_at, sum_at = (e.floats_at(state, tile, past_outputs=n) for n in (1, 2))
        largest = []
        for query, offsets in enumerate(places):
            scores = [v.load(self.scores, FLOAT, form.lanes, offset=offset) for offset in offsets]
            best = e.largest(functools.reduce(e.larger, scores))
            largest.append(e.larger(best, v.load(largest_at, FLOAT, offset=4 * query)))
        bases = [e.larger(value, ir.Constant(FLOAT, LOWEST)) for value in largest]
        lanes = 2 ** (form.tile - 1).bit_length()  # factors of all queries at once
        steps = ir.Constant(ir.VectorType(FLOAT, lanes), [0.0] * lanes)
        for query, base in enumerate(bases):
            step = b.fsub(v.load(largest_at, FLOAT, offset=4 * query), base)
            steps = b.insert_element(steps, step, ir.Constant(I32, query))
        factors = exp2(v, steps)
        for query, offsets in enumerate(places):
            base = e.as_vector(bases[query])
            weights = [
                exp2(v, b.fsub(v.load(self.scores, FLOAT, form.lanes, offset=offset), base)) for offset in offsets
            ]
            total = v.total(functools.reduce(b.fadd, weights))
            if self.value_scales is not None:
                scales = [v.load(self.value_scales, FLOAT, form.lanes, offset=4 * start) for start in starts]
                if form.stored == "float8_e4m3fn":
                    scales = [b.fmul(scale, v.splat(FLOAT8_FACTOR, scale)) for scale in scales]
                weights = [b.fmul(weight, scale) for weight, scale in zip(weights, scales, strict=True)]
            self.keep(query, weights)
            factor = v.lane(factors, query)
            v.store(e.as_vector(factor), v.address(self.factors, 4 * form.lanes * query))
            v.store(largest[query], v.address(largest_at, 4 * query))
            here = v.address(sum_at, 4 * query)
            v.store(b.fadd(b.fmul(v.load(here, FLOAT), factor), total), here)

    def keep(self, query: int, weights: list[Value]) -> None:
        """Stores a block's weights, times the scales of its values."""
        for part, weight in enumerate(weights):
            offset = 4 * (MOST_BLOCK * query + part * self.form.lanes)
            self.e.v.store(weight, self.e.v.address(self.scores, offset))

    def add(self, state: Value, tile: Value, values: Value, stride: Value, count: Value, ahead: Value) -> None:
        """Adds a block's values, weighted, to a tile's outputs, some columns at a time."""
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        for first in range(0, e.parts, self.columns):
            for query in range(form.tile):
                factor = v.load(self.factors, FLOAT, form.lanes, offset=4 * form.lanes * query)
                outputs = e.floats_at(state, v.address(tile, query))
                for i, output in enumerate(self.outputs[query]):
                    before = v.load(outputs, FLOAT, form.lanes, offset=4 * form.lanes * (first + i))
                    b.store(b.fmul(before, factor), output)

            def one(key: Value, first: int = first) -> None:
                address = v.address(values, b.mul(key, stride))
                if first == 0:
                    for line in range(0, form.row_bytes, LINE_BYTES):
                        v.prefetch(v.address(v.address(address, ahead), line))
                stored: list[Value] = []
                for part in range(first, first + self.columns, e.at_once):
                    stored += e.read(address, part)
                for query in range(form.tile):
                    place = v.address(self.scores, b.add(e.times(key, 4), v.integer(4 * MOST_BLOCK * query)))
                    weight = e.as_vector(v.load(place, FLOAT))
                    for output, value in zip(self.outputs[query], stored, strict=True):
                        b.store(v.fma(weight, value, b.load(output)), output)

            e.loop(0, count, 1, one)
            for query in range(form.tile):
                outputs = e.floats_at(state, v.address(tile, query))
                for i, output in enumerate(self.outputs[query]):
                    v.store(b.load(output), v.address(outputs, 4 * form.lanes * (first + i)))


def totals(v: Vectors, vectors: list[Value]) -> Value:
    """The sums of four vectors' lanes, as a vector of four."""
    lanes = vectors[0].type.count
    add = v.b.fadd if vectors[0].type.element == FLOAT else v.b.add
    for _ in range(2):  # pairs of neighbours within each four lanes, which processors do in one step
        halves = []
        for low, high in zip(vectors[::2], vectors[1::2], strict=True):
            even, odd = (
                [4 * quad + i + (lanes if half else 0) for quad in range(lanes // 4) for half in (0, 1) for i in places]
                for places in ((0, 2), (1, 3))
            )
            halves.append(add(v.shuffle(low, high, even), v.shuffle(low, high, odd)))
        vectors = halves
    (total,) = vectors
    while total.type.count > 4:
        total = add(*v.split(total, total.type.count // 2))
    return total
