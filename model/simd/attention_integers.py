"""Emits attention to 8-bit codes in integers: queries and weights are rounded to 16 bits, sums are exact.

A product of 16-bit integers takes half as long as one of float32, and codes need not become float32. What is rounded is
at most 2^-16 of a query's largest element times its channel's scale, and of the largest weight of a block of keys times
its value's scale; codes were rounded to 2^-8 of the largest.
"""

from __future__ import annotations

import functools

from llvmlite import ir

from model.simd.attention_blocks import KEY_ROWS, Blocks, totals
from model.simd.attention_form import MOST_BLOCK
from model.simd.attention_states import Emitter
from model.simd.functions import LINE_BYTES
from model.simd.vectors import FLOAT, I8, I16, I32, Value

LARGEST = 32767.0
SMALLEST = 1e-30
"""Of what is divided by."""

MADD = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
VNNI = {8: "llvm.x86.avx512.vpdpwssd.256", 16: "llvm.x86.avx512.vpdpwssd.512"}


class IntegerBlocks(Blocks):
    """Rows are read in parts of twice as many codes as there are lanes: pairs of them are multiplied and added."""

    def __init__(self, e: Emitter) -> None:
        super().__init__(e)
        self.pairs = ir.VectorType(I32, e.form.lanes)
        self.none = ir.Constant(self.pairs, [0] * e.form.lanes)
        self.steps = [e.b.alloca(FLOAT) for _ in range(e.form.tile)]  # what 1 stands for, in queries
        self.weight_steps = [e.b.alloca(FLOAT) for _ in range(e.form.tile)]
        self.weights = e.local(I16, e.form.tile * MOST_BLOCK)
        self.sums = [[e.b.alloca(self.pairs) for _ in range(self.columns)] for _ in range(e.form.tile)]

    def codes(self, address: Value, part: int) -> Value:
        """Part number `part`, of 2 * lanes codes, in 16 bits."""
        stored = self.e.v.load(address, I8, 2 * self.form.lanes, offset=2 * self.form.lanes * part)
        return self.e.v.widened(stored, I16, signed=True)

    def multiply_add(self, sums: Value, x: Value, y: Value) -> Value:
        """Sums of neighbours' products, added to `sums`; x and y are 16-bit integers."""
        v, b, lanes = self.e.v, self.e.b, self.form.lanes
        if self.form.integers == "vnni":
            return v.call(VNNI[lanes], self.pairs, [sums, b.bitcast(x, self.pairs), b.bitcast(y, self.pairs)])
        return b.add(sums, v.call(MADD[lanes], self.pairs, [x, y]))

    def rounded(self, vectors: list[Value]) -> tuple[list[Value], Value]:
        """Vectors as 16-bit integers, and what 1 stands for in them."""
        e, b, v = self.e, self.e.b, self.e.v
        sizes = [v.call(f"llvm.fabs.v{x.type.count}f32", x.type, [x]) for x in vectors]
        largest = e.larger(e.largest(functools.reduce(e.larger, sizes)), ir.Constant(FLOAT, SMALLEST))
        factor = e.as_vector(b.fdiv(ir.Constant(FLOAT, LARGEST), largest))
        integers = []
        for x in vectors:
            shifted = v.fma(x, factor, v.splat(1.5 * 2.0**23, x))  # to the nearest integer, in the lowest bits
            integers.append(b.trunc(b.bitcast(shifted, self.pairs), ir.VectorType(I16, e.form.lanes)))
        return integers, b.fmul(largest, ir.Constant(FLOAT, 1 / LARGEST))

    def scale(self, rows: Value, key_scales: Value) -> Value:
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        parts = range(e.parts)
        scales = [v.load(key_scales, FLOAT, form.lanes, offset=4 * form.lanes * part) for part in parts]
        for query in range(form.tile):
            offsets = [4 * (query * form.head_dim + part * form.lanes) for part in parts]
            elements = [v.load(rows, FLOAT, form.lanes, offset=offset) for offset in offsets]
            integers, step = self.rounded([b.fmul(x, scale) for x, scale in zip(elements, scales, strict=True)])
            for offset, x in zip(offsets, integers, strict=True):
                v.store(x, v.address(self.scaled, offset // 2))
            b.store(step, self.steps[query])
        return self.scaled

    def multiply(self, rows: Value, keys: Value, stride: Value, count: Value, ahead: Value) -> None:
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        last = b.sub(count, v.integer(1))

        def four(key: Value) -> None:
            addresses = self.key_addresses(keys, stride, key, last, ahead)
            sums = [[self.none] * KEY_ROWS for _ in range(form.tile)]
            for part in range(e.parts // 2):
                stored = [self.codes(address, part) for address in addresses]
                for query in range(form.tile):
                    place = 2 * (query * form.head_dim + 2 * part * form.lanes)
                    x = v.load(rows, I16, 2 * form.lanes, offset=place)
                    for row in range(KEY_ROWS):
                        sums[query][row] = self.multiply_add(sums[query][row], stored[row], x)
            for query in range(form.tile):
                score = b.sitofp(totals(v, sums[query]), ir.VectorType(FLOAT, KEY_ROWS))
                score = b.fmul(score, v.splat(b.load(self.steps[query]), score))
                v.store(score, v.address(self.scores, b.add(e.times(key, 4), v.integer(4 * MOST_BLOCK * query))))

        e.loop(0, count, KEY_ROWS, four)

    def keep(self, query: int, weights: list[Value]) -> None:
        integers, step = self.rounded(weights)
        for part, x in enumerate(integers):
            place = 2 * (MOST_BLOCK * query + part * self.form.lanes)
            self.e.v.store(x, self.e.v.address(self.weights, place))
        self.e.b.store(step, self.weight_steps[query])

    def add(self, state: Value, tile: Value, values: Value, stride: Value, count: Value, ahead: Value) -> None:
        """Two values at a time, interleaved; where there is no second one, its weight is 0."""
        e, b, v, form = self.e, self.e.b, self.e.v, self.form
        last = b.sub(count, v.integer(1))
        for first in range(0, e.parts, self.columns):
            for sum_ in (s for some in self.sums for s in some):
                b.store(self.none, sum_)

            def two(key: Value, first: int = first) -> None:
                second = v.address(key, 1)
                second = b.select(b.icmp_signed("<", second, last), second, last)
                addresses = [v.address(values, b.mul(number, stride)) for number in (key, second)]
                if first == 0:
                    for line in range(0, 2 * form.row_bytes, LINE_BYTES):
                        v.prefetch(v.address(v.address(addresses[0], ahead), line))
                stored: list[Value] = []
                for part in range(first // 2, (first + self.columns) // 2):
                    stored += self.interleaved(*(self.codes(address, part) for address in addresses))
                for query in range(form.tile):
                    place = v.address(self.weights, b.add(e.times(key, 2), v.integer(2 * MOST_BLOCK * query)))
                    pair = v.splat_new(v.load(place, I32), I32, form.lanes)
                    weights = b.bitcast(pair, ir.VectorType(I16, 2 * form.lanes))
                    for sum_, value in zip(self.sums[query], stored, strict=True):
                        b.store(self.multiply_add(b.load(sum_), value, weights), sum_)

            e.loop(0, count, 2, two)
            for query in range(form.tile):
                factor = v.load(self.factors, FLOAT, form.lanes, offset=4 * form.lanes * query)
                step = e.as_vector(b.load(self.weight_steps[query]))
                outputs = e.floats_at(state, v.address(tile, query))
                for i, sum_ in enumerate(self.sums[query]):
                    here = v.address(outputs, 4 * form.lanes * (first + i))
                    kept = b.fmul(v.load(here, FLOAT, form.lanes), factor)
                    v.store(v.fma(b.sitofp(b.load(sum_), e.vector), step, kept), here)

    def interleaved(self, first: Value, second: Value) -> list[Value]:
        """Pairs of both rows' codes; the first half of every eight, then the others: what processors do in one step."""
        count = first.type.count
        halves = []
        for half in (0, 4):
            places = [8 * lane + half + i for lane in range(count // 8) for i in range(4)]
            halves.append(self.e.v.shuffle(first, second, [x for place in places for x in (place, count + place)]))
        return halves
