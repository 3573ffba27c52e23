"""Emits the LLVM instructions that decoders and products are made of. Vectors have as many lanes as the text says.

LLVM splits vectors into what the processor has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from model.simd.layouts import LANES, TABLE_LOOK_UPS

FLOAT, HALF = ir.FloatType(), ir.HalfType()
LOG2_E = math.log2(math.e)
LN_2 = (0.693359375, math.log(2) - 0.693359375)
"""In two parts: the first has few bits, so that small integers times it are exact."""

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))

Value = Any
"""A value in LLVM's intermediate representation: llvmlite has no types of its own for mypy."""


class Vectors:
    """A builder of instructions. Addresses are i64."""

    def __init__(self, builder: Any, architecture: str, *, is_exact: bool = True) -> None:
        self.b = builder
        self.is_exact = is_exact  # also in signs of zeros, and in codes that are not numbers: products do without
        self.architecture = architecture  # as `platform.machine()` says

    def address(self, base: Value, offset: Value | int) -> Value:
        return self.b.add(base, self.integer(offset))

    def integer(self, value: Value | int, kind: Any = I64) -> Value:
        return ir.Constant(kind, value) if isinstance(value, int) else value

    def load(self, address: Value, kind: Any, lanes: int = 0, *, offset: int = 0) -> Value:
        """A scalar (lanes 0) or a vector, at any alignment."""
        kind = ir.VectorType(kind, lanes) if lanes else kind
        pointer = self.b.inttoptr(self.address(address, offset) if offset else address, kind.as_pointer())
        return self.b.load(pointer, align=1)

    def store(self, value: Value, address: Value) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def constant(self, values: Sequence[float], kind: Any) -> Value:
        return ir.Constant(ir.VectorType(kind, len(values)), list(values))

    def splat(self, value: Value | float, like: Value) -> Value:
        """A scalar or a number in all lanes of a vector like `like`."""
        kind = like.type
        if isinstance(value, int | float):
            return ir.Constant(kind, [value] * kind.count)
        single = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(single, single, [0] * kind.count)

    def splat_new(self, value: Value, kind: Any, lanes: int) -> Value:
        """A scalar in all lanes of a new vector."""
        return self.splat(value, ir.Constant(ir.VectorType(kind, lanes), ir.Undefined))

    def lane(self, vector: Value, lane: int) -> Value:
        return self.b.extract_element(vector, ir.Constant(I32, lane))

    def spread(self, vector: Value, lane: int, lanes: int = LANES) -> Value:
        """One lane's value in all lanes."""
        return self.shuffle(vector, vector, [lane] * lanes)

    def shuffle(self, first: Value, second: Value, lanes: Sequence[int]) -> Value:
        return self.b.shuffle_vector(first, second, self.constant(lanes, I32))

    def join(self, first: Value, second: Value) -> Value:
        """Two vectors, one behind the other."""
        return self.shuffle(first, second, range(2 * first.type.count))

    def interleave(self, first: Value, second: Value) -> Value:
        count = first.type.count
        return self.shuffle(first, second, [lane for i in range(count) for lane in (i, count + i)])

    def split(self, vector: Value, lanes: int = LANES) -> list[Value]:
        """In parts of so many lanes."""
        parts = range(0, vector.type.count, lanes)
        return [self.shuffle(vector, vector, range(start, start + lanes)) for start in parts]

    def bits(self, codes: Value, mask: int, shift: int = 0) -> Value:
        """Unsigned codes shifted by `shift` to the left, or to the right where it is negative, and masked."""
        if shift:
            move = self.b.shl if shift > 0 else self.b.lshr
            codes = move(codes, self.splat(abs(shift), codes))
        whole = (1 << codes.type.element.width) - 1
        is_clear = shift < 0 and mask == whole >> -shift
        return codes if is_clear or mask == whole else self.b.and_(codes, self.splat(mask, codes))

    def nibbles(self, codes: Value) -> tuple[Value, Value]:
        """The low and the high halves of bytes."""
        return self.bits(codes, 15), self.bits(codes, 15, -4)

    def widened(self, codes: Value, kind: Any, *, signed: bool) -> Value:
        target = ir.VectorType(kind, codes.type.count) if isinstance(codes.type, ir.VectorType) else kind
        return self.b.sext(codes, target) if signed else self.b.zext(codes, target)

    def floats(self, codes: Value, *, signed: bool) -> Value:
        """Integers of up to 16 bits, a vector or a scalar, as float32."""
        wide = self.widened(codes, I32, signed=signed)
        is_vector = isinstance(wide.type, ir.VectorType)
        return self.b.sitofp(wide, ir.VectorType(FLOAT, wide.type.count) if is_vector else FLOAT)

    def nibble_floats(self, codes: Value) -> tuple[Value, Value]:
        """The low and the high halves of bytes, unsigned, as float32."""
        wide = self.widened(codes, I32, signed=False)
        halves = self.bits(wide, 15), self.b.lshr(wide, self.splat(4, wide))
        return self.floats(halves[0], signed=False), self.floats(halves[1], signed=False)

    def from_half(self, bits: Value) -> Value:
        """16-bit patterns of float16, a vector or a scalar, as float32."""
        if isinstance(bits.type, ir.VectorType):
            count = bits.type.count
            return self.b.fpext(self.b.bitcast(bits, ir.VectorType(HALF, count)), ir.VectorType(FLOAT, count))
        return self.b.fpext(self.b.bitcast(bits, HALF), FLOAT)

    def from_bfloat16(self, bits: Value) -> Value:
        """16-bit patterns of bfloat16, a vector or a scalar, as float32."""
        wide = self.widened(bits, I32, signed=False)
        if isinstance(bits.type, ir.VectorType):
            return self.b.bitcast(self.b.shl(wide, self.splat(16, wide)), ir.VectorType(FLOAT, bits.type.count))
        return self.b.bitcast(self.b.shl(wide, ir.Constant(I32, 16)), FLOAT)

    def look_up(self, table: Sequence[int], codes: Value) -> Value:
        """For codes 0 to 15 in 16 bytes, entries of a table of signed bytes."""
        return self.call(TABLE_LOOK_UPS[self.architecture], codes.type, [self.constant(table, I8), codes])

    def call(self, name: str, result: Any, arguments: Sequence[Value]) -> Value:
        """An intrinsic or another function outside of the module."""
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(function, list(arguments))

    def prefetch(self, address: Value) -> None:
        """Asks for the line of memory at an address, which need not be the process's."""
        i8 = self.b.inttoptr(address, I8.as_pointer())
        read, keep, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), [i8, read, keep, data])

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])

    def exponential(self, x: Value) -> Value:
        """e^x of a float32 vector to within 2e-7 of it; arguments beyond -87 and 88 count as those."""
        kind = f"v{x.type.count}f32"
        x = self.call(f"llvm.minnum.{kind}", x.type, [x, self.splat(88.0, x)])
        x = self.call(f"llvm.maxnum.{kind}", x.type, [x, self.splat(-87.0, x)])
        power = self.call(f"llvm.rint.{kind}", x.type, [self.b.fmul(x, self.splat(LOG2_E, x))])
        for part in LN_2:  # x - power * ln 2, between -0.35 and 0.35
            x = self.fma(power, self.splat(-part, x), x)
        result = self.splat(1 / math.factorial(7), x)
        for degree in range(6, -1, -1):
            result = self.fma(result, x, self.splat(1 / math.factorial(degree), x))
        whole = self.b.fptosi(power, ir.VectorType(I32, x.type.count))
        bits = self.b.shl(self.b.add(whole, self.splat(127, whole)), self.splat(23, whole))
        return self.b.fmul(result, self.b.bitcast(bits, x.type))

    def centred(self, numbers: Value, offset: int, scale: Value) -> Value:
        """(numbers - offset) * scale, rounded once, for small integers, an offset that is a power of two, a scalar."""
        factor = self.splat(scale, numbers)
        if self.is_exact:
            return self.b.fmul(self.b.fsub(numbers, self.splat(float(offset), numbers)), factor)
        shift = self.b.fmul(scale, ir.Constant(FLOAT, -float(offset)))
        return self.fma(numbers, factor, self.splat(shift, numbers))

    def total(self, vector: Value) -> Value:
        """The sum of a vector's lanes."""
        while vector.type.count > 1:
            half = vector.type.count // 2
            low, high = self.split(vector, half)
            vector = self.b.fadd(low, high)
        return self.lane(vector, 0)

    def loop(self, start: Value, end: Value, step: int, body: Callable[[Value], None]) -> None:
        """for (i = start; i < end; i += step) body(i), with i64."""
        b = self.b
        before = b.block
        head, inner, after = (b.append_basic_block(name) for name in ("head", "inner", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", i, end), inner, after)
        b.position_at_end(inner)
        body(i)
        i.add_incoming(b.add(i, ir.Constant(I64, step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        """if (condition) body()."""
        inner, after = (self.b.append_basic_block(name) for name in ("then", "after"))
        self.b.cbranch(condition, inner, after)
        self.b.position_at_end(inner)
        body()
        self.b.branch(after)
        self.b.position_at_end(after)
