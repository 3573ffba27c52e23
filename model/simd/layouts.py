"""How stored forms lie in memory, for the vector code that reads them. Plain data: imports neither torch nor llvmlite.

A layout is of a matrix (C_out, C_in). What its numbers mean is in `model.simd.decoders`. Equal ones share machine code.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.quantization.gguf_types import BY_NAME

LANES = 16
"""Numbers of the vectors that products work on: a register of AVX-512, two of AVX2, four of NEON."""

STEP = 64

TABLE_LOOK_UPS = {
    "x86_64": "llvm.x86.ssse3.pshuf.b.128",
    "AMD64": "llvm.x86.ssse3.pshuf.b.128",
    "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
    "arm64": "llvm.aarch64.neon.tbl1.v16i8",
}
"""By `platform.machine()`: an instruction that looks bytes up in 16 of them."""


@dataclass(frozen=True)
class Numbers:
    """Scalars in a dtype of torch; uint8 holds exponents of two with 127 added."""

    dtype: str  # "float32", "float16", "bfloat16", "float8_e4m3fn" or "uint8"

    @property
    def num_bytes(self) -> int:
        return {"float32": 4, "float16": 2, "bfloat16": 2}.get(self.dtype, 1)


@dataclass(frozen=True)
class Scales:
    """A scale for `group` weights of a row (0: all), and for `rows` rows (0: all)."""

    numbers: Numbers
    group: int
    rows: int = 1


class Layout:
    """What all layouts have. Subclasses are frozen dataclasses."""

    @property
    def step(self) -> int:
        """Weights that are decoded at a time, a multiple of LANES; a row must be a whole number of such steps."""
        return STEP

    @property
    def step_bytes(self) -> int:
        """Bytes of a step in the first tensor."""
        return self.step

    @property
    def rows_per_entry(self) -> tuple[int, ...]:
        """For each tensor, how many rows of the matrix share one of its rows; 0: all."""
        return (1,)


@dataclass(frozen=True)
class Plain(Layout):
    """Tensors: weights (C_out, C_in)."""

    numbers: Numbers

    @property
    def step_bytes(self) -> int:
        return self.step * self.numbers.num_bytes


@dataclass(frozen=True)
class Columns(Layout):
    """Tensors: weights (C_in, C_out)."""

    numbers: Numbers


class Scaled(Layout):
    """Layouts with scales in groups of weights."""

    scales: Scales

    @property
    def step(self) -> int:
        return STEP if self.scales.group % STEP == 0 else self.scales.group


@dataclass(frozen=True)
class Integers(Scaled):
    """Tensors: codes; scales; with `zero`, zero points. w = (code - offset - zero) * scale.

    `zero` says how these are stored: "int8" like scales; "packed": 32-bit words (rows / codes a word, groups), unsigned
    with half the range added, the first row's in the low bits.
    """

    bits: int  # 4: two in a byte, unsigned, the first in the low bits; 8: a byte
    offset: int  # that was added to signed codes to make them unsigned, a power of two; 0 for signed bytes
    scales: Scales
    zero: str = ""
    factor: float = 0.0  # that the product is multiplied by in the end; 0: none

    @property
    def step_bytes(self) -> int:
        return self.step * self.bits // 8

    @property
    def rows_per_entry(self) -> tuple[int, ...]:
        zero = {"": (), "int8": (self.scales.rows,), "packed": (32 // self.bits,)}[self.zero]
        return (1, self.scales.rows, *zero)


@dataclass(frozen=True)
class Affine(Scaled):
    """Tensors: codes of 4 or 8 bits, unsigned, a byte's low half first; scales; biases. w = code * scale + bias."""

    bits: int
    scales: Scales

    @property
    def step_bytes(self) -> int:
        return self.step * self.bits // 8

    @property
    def rows_per_entry(self) -> tuple[int, ...]:
        return (1, 1, 1)


@dataclass(frozen=True)
class Float8(Scaled):
    """Tensors: codes e4m3; scales."""

    scales: Scales

    @property
    def rows_per_entry(self) -> tuple[int, ...]:
        return (1, self.scales.rows)


@dataclass(frozen=True)
class Float4(Layout):
    """Tensors: codes e2m1, two in a byte, the low half first; scales; perhaps one global scale.

    `divides` says whether scales are divided by it or multiplied; None: there is none.
    """

    scales: Scales
    divides: bool | None = None

    @property
    def step(self) -> int:
        return STEP if STEP % self.scales.group == 0 else self.scales.group

    @property
    def step_bytes(self) -> int:
        return self.step // 2

    @property
    def rows_per_entry(self) -> tuple[int, ...]:
        return (1, 1) if self.divides is None else (1, 1, 0)


@dataclass(frozen=True)
class Blocks(Layout):
    """Tensors: GGUF's blocks of one type (C_out, bytes of a row)."""

    type_name: str

    @property
    def step(self) -> int:
        return BY_NAME[self.type_name].block_weights

    @property
    def step_bytes(self) -> int:
        return BY_NAME[self.type_name].block_bytes
