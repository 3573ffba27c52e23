"""What code of attention depends on, and where it finds its arguments. Plain data, without torch and llvmlite."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto

from model.simd.layouts import Numbers

MOST_BLOCK = 64
"""Keys whose scores are kept while their values are read, at most."""

RANGE_KEYS = 512
"""Keys of a unit of work, about: the largest multiple of a block up to it."""


SCALED = ("int8", "float8_e4m3fn")
"""Types of codes: keys have a float32 scale for each channel and group of tokens, values one for each token."""


@dataclass(frozen=True)
class AttentionForm:
    """What machine code depends on: equal ones share it."""

    stored: str  # dtype of keys and values by name; those of SCALED are codes
    queries: str  # dtype of the queries
    head_dim: int  # a multiple of 16
    tile: int  # queries that share each key that was read
    lanes: int
    integers: str = ""  # how 16-bit integers are multiplied: "vnni", "madd", or not at all

    @property
    def is_integral(self) -> bool:
        """Whether queries and weights are rounded to 16 bits, for products with 8-bit codes in integers."""
        return self.stored == "int8" and bool(self.integers)

    @property
    def has_scales(self) -> bool:
        return self.stored in SCALED

    @property
    def row_bytes(self) -> int:
        return self.head_dim * (1 if self.has_scales else Numbers(self.stored).num_bytes)


class Argument(IntEnum):
    """Places of the 64-bit arguments. Strides are in bytes."""

    NEXT = 0  # the number of the next unit that a thread takes
    TABLE = auto()  # address of the segments' records
    FIRST_RANGE = auto()  # of those of all segments, one after the other
    RANGES = auto()  # from that one on, in this call
    SEGMENT_RANGES = auto()  # of each segment; those past its end are empty
    RANGE_KEYS = auto()
    BLOCK = auto()  # keys of a block, or of a group with scales of its own
    HEADS = auto()  # KV heads of a row
    UNIT_HEADS = auto()  # KV heads of all rows
    QUERIES = auto()  # for each of them
    PADDED = auto()  # the same, as a multiple of the tile
    GROUP = auto()  # query heads of a KV head
    TOKENS = auto()  # queries of a head
    IS_FIRST = auto()  # whether totals begin
    FIRST = auto()  # position of the first query
    SCALE = auto()  # of scores, a float64's bits
    PREPARED = auto()  # queries (UNIT_HEADS, PADDED, D) as they are multiplied
    POSITIONS = auto()  # (PADDED,) one past each query's, int64
    DONE = auto()  # (UNIT_HEADS,) ranges done, int64
    TOTALS = auto()  # states (UNIT_HEADS,)
    STATES = auto()  # states (RANGES, UNIT_HEADS)
    STATE_BYTES = auto()
    INPUT = auto()  # queries, then outputs, then log-sum-exp: each an address, and strides of rows, heads and tokens


INPUT, OUTPUT, LSE = range(Argument.INPUT, Argument.INPUT + 12, 4)


class Record(IntEnum):
    """Places of what is known of a segment, 64-bit integers."""

    KEYS = 0  # each of these: address, and strides of rows, heads and tokens (or groups)
    VALUES = 4
    KEY_SCALES = 8
    VALUE_SCALES = 12
    LENGTH = 16
    START = 17
    COUNT = 18
