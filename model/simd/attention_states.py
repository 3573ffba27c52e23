"""What the code of attention is emitted with: where things lie, how stored numbers are read, and powers of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from model.simd.attention_form import Argument, AttentionForm
from model.simd.decoders import float8_as_half
from model.simd.vectors import FLOAT, I8, I16, I32, I64, Value, Vectors
from model.simd.words import WORD

EXP2 = (
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353360504377633,
)
"""2^x - 1 on [-0.5, 0.5] divided by x, as a polynomial, lowest first: relative error 2e-9 before rounding."""

LEAST_EXPONENT = -126.0
LOWEST = -1e38


def exp2(v: Vectors, x: Value) -> Value:
    """2^x of a float32 vector without positive elements, to one unit in the last place; 0 below 2^-126."""
    b = v.b
    magic = v.splat(1.5 * 2.0**23, x)
    shifted = b.fadd(x, magic)  # to the nearest integer, which is then in the lowest bits
    rest = b.fsub(x, b.fsub(shifted, magic))
    result = v.splat(EXP2[-1], x)
    for coefficient in EXP2[-2::-1]:
        result = v.fma(result, rest, v.splat(coefficient, x))
    result = v.fma(result, rest, v.splat(1.0, x))
    whole = ir.VectorType(I32, x.type.count)
    shift = v.splat(23, ir.Constant(whole, ir.Undefined))
    exponent = b.shl(b.bitcast(shifted, whole), shift)
    powers = b.bitcast(b.add(b.bitcast(result, whole), exponent), x.type)
    return b.select(b.fcmp_ordered("<", x, v.splat(LEAST_EXPONENT, x)), v.splat(0.0, x), powers)


class Emitter:
    """Emits the functions of one form."""

    def __init__(self, module: Any, name: str, form: AttentionForm, architecture: str) -> None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), name)
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.form, self.v = form, Vectors(self.b, architecture, is_exact=False)
        (self.arguments,) = function.args
        self.vector = ir.VectorType(FLOAT, form.lanes)
        self.parts = form.head_dim // form.lanes  # vectors of a row
        self.zero = ir.Constant(self.vector, [0.0] * form.lanes)

    def argument(self, place: int) -> Value:
        return self.v.load(self.arguments, I64, offset=WORD * place)

    def times(self, value: Value, factor: Value | int) -> Value:
        return self.b.mul(value, self.v.integer(factor))

    def local(self, kind: Any, count: int = 1) -> Value:
        """The address of memory on the stack. Only before the first loop."""
        return self.b.ptrtoint(self.b.alloca(kind, count), I64)

    def loop(self, start: Value | int, end: Value | int, step: int, work: Callable[[Value], None]) -> None:
        self.v.loop(self.v.integer(start), self.v.integer(end), step, work)

    def strided(self, place: int, numbers: tuple[Value, ...], base: Value | None = None) -> Value:
        """An element's address, given its numbers along the axes that have strides at `place`."""
        start = self.arguments if base is None else base
        address = self.v.load(start, I64, offset=WORD * place)
        for axis, number in enumerate(numbers):
            stride = self.v.load(start, I64, offset=WORD * (place + 1 + axis))
            address = self.v.address(address, self.b.mul(number, stride))
        return address

    def query(self, head: Value, number: Value) -> tuple[Value, Value, Value]:
        """Row, head and token of one of a KV head's queries."""
        b, tokens, group = self.b, self.argument(Argument.TOKENS), self.argument(Argument.GROUP)
        heads = self.argument(Argument.HEADS)
        of_all = b.udiv(number, tokens)
        row = b.add(b.udiv(head, heads), b.udiv(of_all, group))
        return row, b.add(b.mul(b.urem(head, heads), group), b.urem(of_all, group)), b.urem(number, tokens)

    def floats_at(self, state: Value, number: Value | int, *, past_outputs: int = 0) -> Value:
        """In a state: where a query's outputs are, or its largest score (1) and sum of weights (2)."""
        v, padded = self.v, self.argument(Argument.PADDED)
        if not past_outputs:
            return v.address(state, self.times(v.integer(number), 4 * self.form.head_dim))
        before = self.times(padded, 4 * (self.form.head_dim + past_outputs - 1))
        return v.address(state, self.b.add(before, self.times(v.integer(number), 4)))

    def clear(self, state: Value, number: Value) -> None:
        """The state of a query that has seen no key."""
        for part in range(self.parts):
            self.v.store(self.zero, self.v.address(self.floats_at(state, number), 4 * self.form.lanes * part))
        self.v.store(ir.Constant(FLOAT, float("-inf")), self.floats_at(state, number, past_outputs=1))
        self.v.store(ir.Constant(FLOAT, 0.0), self.floats_at(state, number, past_outputs=2))

    def read(self, address: Value, part: int) -> list[Value]:
        """Part number `part` of a stored row, and with bfloat16 the one behind it: even elements, then odd ones."""
        v, b, stored, lanes = self.v, self.b, self.form.stored, self.form.lanes
        first = part * lanes
        if stored == "float32":
            return [v.load(address, FLOAT, lanes, offset=4 * first)]
        if stored == "float16":
            return [v.from_half(v.load(address, I16, lanes, offset=2 * first))]
        if stored == "bfloat16":
            pairs = v.load(address, I32, lanes, offset=2 * first)
            even, odd = b.shl(pairs, v.splat(16, pairs)), b.and_(pairs, v.splat(-0x10000, pairs))
            return [b.bitcast(x, self.vector) for x in (even, odd)]
        codes = v.load(address, I8, lanes, offset=first)
        if stored == "int8":
            return [v.floats(codes, signed=True)]
        return [v.from_half(float8_as_half(v, codes))]

    @property
    def at_once(self) -> int:
        """Parts that `read` gives."""
        return 2 if self.form.stored == "bfloat16" else 1

    @property
    def added_at_once(self) -> int:
        """Parts of outputs that lie in an order of their own."""
        return 2 if self.form.is_integral else self.at_once

    def as_read(self, parts: list[Value]) -> list[Value]:
        """Consecutive vectors in the order in which `read` gives elements."""
        if self.at_once == 1:
            return parts
        low, high = parts
        lanes = self.form.lanes
        return [self.v.shuffle(low, high, range(odd, 2 * lanes, 2)) for odd in (0, 1)]

    def in_order(self, parts: list[Value]) -> list[Value]:
        """Consecutive vectors of outputs, from the order in which they were added up."""
        if self.form.is_integral:
            quads = [quad for pair in zip(*(self.v.split(part, 4) for part in parts), strict=True) for quad in pair]
            while len(quads) > 2:
                quads = [self.v.join(*pair) for pair in zip(quads[::2], quads[1::2], strict=True)]
            return quads
        return parts if self.at_once == 1 else self.v.split(self.v.interleave(*parts), self.form.lanes)

    def largest(self, vector: Value) -> Value:
        while vector.type.count > 1:
            low, high = self.v.split(vector, vector.type.count // 2)
            vector = self.larger(low, high)
        return self.v.lane(vector, 0)

    def larger(self, x: Value, y: Value) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def as_vector(self, scalar: Value) -> Value:
        return self.v.splat_new(scalar, FLOAT, self.form.lanes)
