"""What numbers the stored codes are: emits the vector code that decodes one step of a row, for each layout.

The values are those that the form's `expand` gives in float32, by operations in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from llvmlite import ir

from model.simd.layouts import LANES, Affine, Float4, Float8, Integers, Layout, Numbers, Plain, Scales
from model.simd.vectors import FLOAT, I8, I16, I32, Value, Vectors


@dataclass(frozen=True)
class Row:
    """One row of a matrix: its number, and where it begins in each of the form's tensors."""

    number: Value
    at: tuple[Value, ...]


@singledispatch
def decode(layout: Layout, v: Vectors, row: Row, step: Value) -> list[Value]:
    """The weights of one step, in order, as float32 in vectors of LANES."""
    raise NotImplementedError(layout)


FLOAT8_FACTOR = 256.0
"""e4m3 has an exponent bias of 7 and float16 of 15: bits at their place in a float16 are values times 2^-8."""

FLOAT4_FACTOR = 2.0**14
"""e2m1 has an exponent bias of 1."""


def load_numbers(numbers: Numbers, v: Vectors, address: Value, lanes: int = 0) -> Value:
    """A number, or consecutive ones, as float32."""
    if numbers.dtype == "float32":
        return v.load(address, FLOAT, lanes)
    bits = v.load(address, I16 if numbers.num_bytes == 2 else I8, lanes)
    if numbers.dtype == "float16":
        return v.from_half(bits)
    if numbers.dtype == "bfloat16":
        return v.from_bfloat16(bits)
    if numbers.dtype == "uint8":
        return _power_of_two(v, bits)
    halves = v.from_half(float8_as_half(v, bits))
    return v.b.fmul(halves, ir.Constant(FLOAT, FLOAT8_FACTOR) if not lanes else v.splat(FLOAT8_FACTOR, halves))


def _power_of_two(v: Vectors, exponent: Value) -> Value:
    """2^(exponent - 127) of a byte; 255 is not a number."""
    wide = v.b.zext(exponent, I32)
    bits = v.b.shl(wide, v.integer(23, I32))
    is_inner = v.b.icmp_unsigned("<", v.b.sub(wide, v.integer(1, I32)), v.integer(254, I32))
    return v.b.bitcast(v.b.select(is_inner, bits, v.b.or_(bits, v.integer(1 << 22, I32))), FLOAT)


def float8_as_half(v: Vectors, codes: Value) -> Value:
    """Bytes of e4m3, a vector or a scalar, as patterns of float16 that are worth 1 / FLOAT8_FACTOR of them.

    A code that is not a number becomes 480 unless numbers are to be exact.
    """
    wide = v.widened(codes, I16, signed=True)  # the sign is where float16 has it, and in the bits below
    if isinstance(wide.type, ir.VectorType):
        magnitude = v.bits(wide, 0x3F80, 7)
        if v.is_exact:
            is_number = v.b.icmp_unsigned("!=", magnitude, v.splat(0x3F80, magnitude))
            magnitude = v.b.select(is_number, magnitude, v.splat(0x7E00, magnitude))
        return v.b.or_(magnitude, v.bits(wide, 0x8000))
    magnitude = v.b.and_(v.b.shl(wide, v.integer(7, I16)), v.integer(0x3F80, I16))
    return v.b.or_(magnitude, v.b.and_(wide, v.integer(-0x8000, I16)))


def float4_as_half(v: Vectors, nibbles: Value) -> Value:
    """Codes of e2m1 in bytes, a vector, as patterns of float16 that are worth 1 / FLOAT4_FACTOR of them."""
    wide = v.widened(nibbles, I16, signed=False)
    return v.b.or_(v.bits(wide, 0x0E00, 9), v.bits(wide, 0x8000, 12))


@decode.register
def _(layout: Plain, v: Vectors, row: Row, step: Value) -> list[Value]:
    size = layout.numbers.num_bytes
    start = v.address(row.at[0], v.b.mul(step, v.integer(layout.step * size)))
    return [
        load_numbers(layout.numbers, v, v.address(start, part * size), LANES) for part in range(0, layout.step, LANES)
    ]


@decode.register
def _(layout: Integers, v: Vectors, row: Row, step: Value) -> list[Value]:
    first = v.b.mul(step, v.integer(layout.step))
    scale = _scale(layout.scales, v, row.at[1], first)
    zero = _zero_point(layout, v, row, first) if layout.zero else None
    parts = []
    for weights in _codes(v, row.at[0], first, layout.bits, layout.step, signed=not layout.offset):
        if zero is not None:
            weights = v.b.fsub(weights, v.splat(zero, weights))
        if zero is None and layout.offset:
            weights = v.centred(weights, layout.offset, scale)
        else:
            weights = v.b.fmul(weights, v.splat(scale, weights))
        parts.append(v.b.fmul(weights, v.splat(layout.factor, weights)) if layout.factor else weights)
    return parts


@decode.register
def _(layout: Affine, v: Vectors, row: Row, step: Value) -> list[Value]:
    first = v.b.mul(step, v.integer(layout.step))
    scale, bias = (_scale(layout.scales, v, row.at[i], first) for i in (1, 2))
    parts = []
    for weights in _codes(v, row.at[0], first, layout.bits, layout.step, signed=False):
        parts.append(v.b.fadd(v.b.fmul(weights, v.splat(scale, weights)), v.splat(bias, weights)))
    return parts


@decode.register
def _(layout: Float8, v: Vectors, row: Row, step: Value) -> list[Value]:
    first = v.b.mul(step, v.integer(layout.step))
    scale = v.b.fmul(_scale(layout.scales, v, row.at[1], first), ir.Constant(FLOAT, FLOAT8_FACTOR))
    codes = v.split(v.load(v.address(row.at[0], first), I8, layout.step))
    halves = [v.from_half(float8_as_half(v, part)) for part in codes]
    return [v.b.fmul(part, v.splat(scale, part)) for part in halves]


@decode.register
def _(layout: Float4, v: Vectors, row: Row, step: Value) -> list[Value]:
    first = v.b.mul(step, v.integer(layout.step))
    codes = v.load(v.address(row.at[0], v.b.udiv(first, v.integer(2))), I8, layout.step // 2)
    parts, scale = [], None
    for number, part in enumerate(v.split(v.interleave(*v.nibbles(codes)))):
        if number * LANES % layout.scales.group == 0:
            scale = _scale(layout.scales, v, row.at[1], v.address(first, number * LANES))
            if layout.divides is not None:
                whole = v.load(row.at[2], FLOAT)
                scale = v.b.fdiv(scale, whole) if layout.divides else v.b.fmul(scale, whole)
            scale = v.b.fmul(scale, ir.Constant(FLOAT, FLOAT4_FACTOR))
        weights = v.from_half(float4_as_half(v, part))
        parts.append(v.b.fmul(weights, v.splat(scale, weights)))
    return parts


def _codes(v: Vectors, row: Value, first: Value, bits: int, count: int, *, signed: bool) -> list[Value]:
    """A row's codes from number `first` on: of 8 bits, or of 4, unsigned, a byte's low half first; as float32."""
    stored = v.load(v.address(row, v.b.udiv(first, v.integer(8 // bits))), I8, count * bits // 8)
    if bits == 4:
        stored = v.interleave(*v.nibbles(stored))
    return [v.floats(part, signed=signed) for part in v.split(stored)]


def _group(scales: Scales, v: Vectors, first: Value) -> Value:
    """The number of the group that a row's weight number `first` is in."""
    return v.b.udiv(first, v.integer(scales.group)) if scales.group else v.integer(0)


def _scale(scales: Scales, v: Vectors, row: Value, first: Value) -> Value:
    """The scale of that group."""
    offset = v.b.mul(_group(scales, v, first), v.integer(scales.numbers.num_bytes))
    return load_numbers(scales.numbers, v, v.address(row, offset))


def _zero_point(layout: Integers, v: Vectors, row: Row, first: Value) -> Value:
    """What is subtracted from codes as they are stored, as float32."""
    group = _group(layout.scales, v, first)
    if layout.zero == "int8":
        zero = v.floats(v.load(v.address(row.at[2], group), I8), signed=True)
        return v.b.fadd(zero, ir.Constant(FLOAT, float(layout.offset)))
    word = v.load(v.address(row.at[2], v.b.mul(group, v.integer(4))), I32)
    place = v.b.urem(row.number, v.integer(32 // layout.bits))
    shift = v.b.trunc(v.b.mul(place, v.integer(layout.bits)), I32)
    code = v.b.and_(v.b.lshr(word, shift), v.integer(2**layout.bits - 1, I32))
    return v.b.sitofp(code, FLOAT)  # unsigned like the codes
