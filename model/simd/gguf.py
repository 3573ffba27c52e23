"""GGUF's blocks as float32 vectors. What the bytes mean is told in `model.quantization`, gguf_simple and gguf_k."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from model.quantization.gguf_simple import IQ4_VALUES, MXFP4_VALUES
from model.quantization.gguf_types import BY_NAME
from model.simd.decoders import Row, decode, load_numbers
from model.simd.layouts import LANES, Blocks, Numbers
from model.simd.vectors import FLOAT, I8, I16, I32, Value, Vectors


@decode.register
def _(layout: Blocks, v: Vectors, row: Row, step: Value) -> list[Value]:
    offset = v.b.mul(step, v.integer(BY_NAME[layout.type_name].block_bytes))
    return DECODED_BY[layout.type_name](v, v.address(row.at[0], offset))


def _number(v: Vectors, at: Value, offset: int = 0) -> Value:
    """A float16 number."""
    return load_numbers(Numbers("float16"), v, v.address(at, offset))


def _times(v: Vectors, numbers: Value, factor: Value) -> Value:
    return v.b.fmul(numbers, v.splat(factor, numbers))


def _affine(v: Vectors, numbers: Sequence[Value], scale: Value, minimum: Value) -> list[Value]:
    """numbers * scale + minimum. Products are exact in float32, so to fuse both operations changes nothing."""
    return [v.fma(part, v.splat(scale, part), v.splat(minimum, part)) for part in numbers]


def _less(v: Vectors, codes: Value, offset: int) -> Value:
    return v.b.sub(codes, v.splat(offset, codes))


def _q4_0(v: Vectors, at: Value) -> list[Value]:
    scale = _number(v, at)
    return [v.centred(part, 8, scale) for part in v.nibble_floats(v.load(at, I8, 16, offset=2))]


def _q4_1(v: Vectors, at: Value) -> list[Value]:
    numbers = v.nibble_floats(v.load(at, I8, 16, offset=4))
    return _affine(v, numbers, _number(v, at), _number(v, at, 2))


def _five_bits(v: Vectors, at: Value, offset: int) -> list[Value]:
    """Codes of 5 bits as float32, twice 16 lanes: 4 bytes of high bits precede 16 of low ones."""
    bits = v.load(at, I32, offset=offset)
    low = v.widened(v.load(at, I8, 16, offset=offset + 4), I32, signed=False)
    codes = []
    for half, nibbles in enumerate((v.bits(low, 15), v.b.lshr(low, v.splat(4, low)))):
        places = v.constant(range(LANES * half, LANES * half + LANES), I32)
        high = v.bits(v.bits(v.b.lshr(v.splat(bits, places), places), 1), 16, 4)
        codes.append(v.floats(v.b.or_(nibbles, high), signed=False))
    return codes


def _q5_0(v: Vectors, at: Value) -> list[Value]:
    scale = _number(v, at)
    return [v.centred(part, 16, scale) for part in _five_bits(v, at, 2)]


def _q5_1(v: Vectors, at: Value) -> list[Value]:
    return _affine(v, _five_bits(v, at, 4), _number(v, at), _number(v, at, 2))


def _q8_0(v: Vectors, at: Value) -> list[Value]:
    scale = _number(v, at)
    return [_times(v, v.floats(part, signed=True), scale) for part in v.split(v.load(at, I8, 32, offset=2))]


def _iq4_nl(v: Vectors, at: Value) -> list[Value]:
    scale, codes = _number(v, at), v.nibbles(v.load(at, I8, 16, offset=2))
    return [_times(v, v.floats(v.look_up(IQ4_VALUES, part), signed=True), scale) for part in codes]


def _mxfp4(v: Vectors, at: Value) -> list[Value]:
    wide = v.b.zext(v.load(at, I8), I32)  # the values in the table are doubled, so the exponent is one less
    small = v.b.shl(v.integer(1 << 21, I32), wide)
    normal = v.b.shl(v.b.sub(wide, v.integer(1, I32)), v.integer(23, I32))
    is_small = v.b.icmp_unsigned("<", wide, v.integer(2, I32))
    scale = v.b.bitcast(v.b.select(is_small, small, normal), FLOAT)
    codes = v.nibbles(v.load(at, I8, 16, offset=1))
    return [_times(v, v.floats(v.look_up(MXFP4_VALUES, part), signed=True), scale) for part in codes]


def _groups(v: Vectors, numbers: Sequence[Value], scales: Value, minimums: Value | None = None) -> list[Value]:
    """Codes as float32, as many vectors to a group as there are more of them than scales; minimums are subtracted."""
    each, parts = len(numbers) // scales.type.count, []
    for number, part in enumerate(numbers):
        scale = v.spread(scales, number // each)
        if minimums is None:
            parts.append(v.b.fmul(part, scale))
        else:
            parts.append(v.fma(part, scale, v.spread(minimums, number // each)))
    return parts


def _two_bits(v: Vectors, at: Value, offset: int) -> list[Value]:
    """64 bytes of 2-bit codes: 16 vectors of 16 bytes, in the order of weights."""
    runs = [v.split(v.load(at, I8, 32, offset=offset + 32 * run)) for run in range(2)]
    return [v.bits(half, 3, -shift) for run in runs for shift in (0, 2, 4, 6) for half in run]


def _q2_k(v: Vectors, at: Value) -> list[Value]:
    scales, minimums = (v.floats(codes, signed=False) for codes in v.nibbles(v.load(at, I8, 16)))
    scales = _times(v, scales, _number(v, at, 80))
    minimums = _times(v, minimums, v.b.fneg(_number(v, at, 82)))
    return _groups(v, [v.floats(codes, signed=False) for codes in _two_bits(v, at, 16)], scales, minimums)


def _q3_k(v: Vectors, at: Value) -> list[Value]:
    masks = v.split(v.load(at, I8, 32))
    codes = []
    for number, low in enumerate(_two_bits(v, at, 32)):
        high = v.bits(v.bits(masks[number % 2], 1, -(number // 2)), 4, 2)
        codes.append(v.floats(_less(v, v.b.or_(low, high), 4), signed=True))
    low = v.load(at, I8, 8, offset=96)
    low = v.join(*v.nibbles(low))
    high = v.load(at, I8, 4, offset=104)
    high = v.join(*(v.join(v.bits(high, 48, 4 - shift), v.bits(high, 48, 2 - shift)) for shift in (0, 4)))
    scales = v.floats(_less(v, v.b.or_(low, high), 32), signed=True)
    return _groups(v, codes, _times(v, scales, _number(v, at, 108)))


def _group_scales(v: Vectors, at: Value) -> tuple[Value, Value]:
    """Q4_K's and Q5_K's scales of 8 groups and, with a minus, their minimums; 8 lanes each."""
    scales, minimums, last = (v.load(at, I8, 4, offset=offset) for offset in (4, 8, 12))
    high_scales = v.b.or_(v.bits(last, 15), v.bits(scales, 48, -2))
    high_minimums = v.b.or_(v.bits(last, 15, -4), v.bits(minimums, 48, -2))
    both = v.join(v.join(v.bits(scales, 63), high_scales), v.join(v.bits(minimums, 63), high_minimums))
    scale, minimum = _number(v, at), v.b.fneg(_number(v, at, 2))
    factors = v.join(v.splat_new(scale, FLOAT, 8), v.splat_new(minimum, FLOAT, 8))
    found = v.split(v.b.fmul(v.floats(both, signed=False), factors), 8)
    return found[0], found[1]


def _q4_k(v: Vectors, at: Value) -> list[Value]:
    codes = []
    for run in range(4):
        halves = [v.nibble_floats(part) for part in v.split(v.load(at, I8, 32, offset=16 + 32 * run))]
        codes += [low for low, _ in halves] + [high for _, high in halves]
    return _groups(v, codes, *_group_scales(v, at))


def _q5_k(v: Vectors, at: Value) -> list[Value]:
    fifth, codes = v.load(at, I8, 32, offset=16), []
    for run in range(4):
        for half, low in enumerate(v.nibbles(v.load(at, I8, 32, offset=48 + 32 * run))):
            both = v.b.or_(low, v.bits(fifth, 16, 4 - (2 * run + half)))
            codes += [v.floats(part, signed=False) for part in v.split(both)]
    return _groups(v, codes, *_group_scales(v, at))


def _q6_k(v: Vectors, at: Value) -> list[Value]:
    codes = []
    for half in range(2):
        low = [v.load(at, I8, 32, offset=64 * half + 32 * run) for run in range(2)]
        high = v.load(at, I8, 32, offset=128 + 32 * half)
        for part in range(4):
            nibbles = v.bits(low[part % 2], 15, -4 * (part // 2))
            both = _less(v, v.b.or_(nibbles, v.bits(high, 48, 4 - 2 * part)), 32)
            codes += [v.floats(group, signed=True) for group in v.split(both)]
    scales = v.floats(v.load(at, I8, 16, offset=192), signed=True)
    return _groups(v, codes, _times(v, scales, _number(v, at, 208)))


def _iq4_xs(v: Vectors, at: Value) -> list[Value]:
    runs = [v.load(at, I8, 16, offset=8 + 16 * run) for run in range(8)]
    codes = [v.floats(v.look_up(IQ4_VALUES, half), signed=True) for run in runs for half in v.nibbles(run)]
    low = v.interleave(*v.nibbles(v.load(at, I8, 4, offset=4)))
    bits = v.widened(v.splat_new(v.load(at, I16, offset=2), I16, 8), I32, signed=False)
    places = v.constant(range(0, 16, 2), I32)
    high = v.bits(v.bits(v.b.lshr(bits, places), 3), 48, 4)
    scales = v.floats(_less(v, v.b.or_(v.widened(low, I32, signed=False), high), 32), signed=True)
    return _groups(v, codes, _times(v, scales, _number(v, at)))


DECODED_BY: Mapping[str, Callable[[Vectors, Value], list[Value]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
"""A block at an address -> its weights."""
