"""Attention of a few queries on a CPU to keys and values as they are stored; where there is no code for it, not at all.

Whether it is taken depends on what is installed, on form and shape, never on a measurement.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.simd import products
from model.simd.attention_form import MOST_BLOCK, RANGE_KEYS, SCALED, AttentionForm, Record
from model.simd.products import dtype_name

if TYPE_CHECKING:
    from model.simd.engine import Engine

Function = Callable[[int], None]

MOST_QUERIES = 512
"""Queries of a KV head, those of all its query heads counted. It is faster than the fused kernels with more, too, but a
prompt is better read by matrix products."""

LARGEST_HEAD = 256

SMALLEST = 2**18
"""Elements of all keys so far that code is compiled for, which takes as long as some hundred attentions to them."""

STATE_BYTES = 8 * 2**20
"""Memory for the states of ranges in one call, unless a single range needs more."""

LINE_BYTES = 64

PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class Segment(Protocol):
    """Consecutive keys and values (B or 1, H_kv, S, D) as they are stored.

    Codes have float32 scales: of keys (B or 1, H_kv, groups, D), of values (B or 1, H_kv, S, 1).
    """

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def key_scales(self) -> Tensor | None: ...
    @property
    def value_scales(self) -> Tensor | None: ...
    @property
    def start(self) -> int: ...
    @property
    def record(self) -> bytes:
        """What `record` returns."""
        ...


def first_of_few(queries: Tensor, first: int, key_heads: int) -> int:
    """From which of T queries (B, H, T, D) on code is worth having, the first of them at this position; T: from none.

    Of no more than FEW_ROWS tokens each query's own position decides, so that others do not matter to it.
    """
    rows, heads, tokens, head_dim = queries.shape
    has_code = (
        rows * tokens * (heads // key_heads) <= MOST_QUERIES
        and head_dim % 16 == 0
        and head_dim <= LARGEST_HEAD
        and queries.dtype in PLAIN
        and queries.stride(3) == 1
        and products.find_engine() is not None
    )
    keys = -(-SMALLEST // (key_heads * head_dim))
    if not has_code or first + tokens < keys:
        return tokens
    return max(0, keys - 1 - first) if tokens <= products.FEW_ROWS else 0


def is_readable(segment: Segment) -> bool:
    """Whether there is code for its form."""
    keys, values, scales = segment.keys, segment.values, (segment.key_scales, segment.value_scales)
    if keys.device.type != "cpu" or keys.stride(3) != 1 or values.stride(3) != 1 or values.dtype != keys.dtype:
        return False
    if scales[0] is None or scales[1] is None:
        return keys.dtype in PLAIN
    tokens, groups = keys.shape[2], scales[0].shape[2]
    return (
        dtype_name(keys.dtype) in SCALED
        and scales[0].stride(3) == 1
        and tokens == groups * (tokens // groups)
        and tokens // groups <= MOST_BLOCK
    )


def _form(segment: Segment) -> tuple[torch.dtype, int]:
    """The type of what is stored, and the keys of a block."""
    scales = segment.key_scales
    return segment.keys.dtype, MOST_BLOCK if scales is None else segment.keys.shape[2] // scales.shape[2]


def record(segment: Segment) -> bytes:
    """What code needs to know of a segment, as long as its tensors stay where they are."""
    tensors = (segment.keys, segment.values, segment.key_scales, segment.value_scales)
    fields = [number for tensor in tensors for number in (_place(tensor) if tensor is not None else (0, 0, 0, 0))]
    fields += [segment.keys.shape[2], segment.start]
    assert len(fields) == Record.COUNT
    return array("q", fields).tobytes()


class FewQueries:
    """Attention of queries (B, H, T, D) at consecutive positions to segments that are added, oldest first.

    A query sees the keys up to its own position. Results are the same however segments are divided among calls. Where
    the queries are of one row, `told` gets segments that were attended to, how many keys a range has, and the
    log-sum-exp (H, T, ranges) of each range, as many of each segment.
    """

    def __init__(self, queries: Tensor, first: int, key_rows: int, key_heads: int) -> None:
        """`key_rows` is B, or 1 where all rows share the keys."""
        rows, heads, tokens, head_dim = queries.shape
        engine = products.find_engine()
        assert engine is not None and key_rows in (1, rows), (key_rows, rows)
        self.engine, self.queries, self.first, self.key_rows = engine, queries, first, key_rows
        self.plan = _plan(engine.has_wide_registers, queries.shape, key_rows, key_heads)
        self.out = torch.empty(rows, tokens, heads, head_dim).transpose(1, 2)
        self.lse = torch.empty(rows, heads, tokens)
        self.fixed = torch.empty(self.plan.fixed_bytes, dtype=torch.uint8)
        self.is_first = True
        self.waiting: list[Segment] = []
        self.told: Callable[[Sequence[Segment], int, Tensor], None] | None = None

    def add(self, segment: Segment) -> None:
        """A readable segment, whose memory must not change before the next `flush` or `finish`."""
        if self.waiting and _form(self.waiting[0]) != _form(segment):
            self.flush()
        self.waiting.append(segment)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Outputs (B, H, T, D) and log-sum-exp of the scores (B, H, T), float32."""
        self.flush()
        return self.out, self.lse

    def flush(self) -> None:
        """Attends to the segments that were added."""
        if self.waiting:
            segments, self.waiting = self.waiting, []
            self._attend(segments)

    def _attend(self, segments: Sequence[Segment]) -> None:
        plan, stored = self.plan, segments[0].keys.dtype
        block = _form(segments[0])[1]
        range_keys = block * max(1, RANGE_KEYS // block)
        each = -(-max(segment.keys.shape[2] for segment in segments) // range_keys)
        at_once = min(each * len(segments), max(1, STATE_BYTES // (plan.unit_heads * plan.state_bytes)))
        table = array("q", b"".join([segment.record for segment in segments]))
        fixed = self.fixed.data_ptr()
        states = torch.empty(at_once * plan.unit_heads * plan.state_bytes, dtype=torch.uint8)
        tensors = (*_place(self.queries), *_place(self.out), *_place(self.lse))
        memory = (*(fixed + place for place in plan.places), states.data_ptr(), plan.state_bytes)
        integers = self.engine.integers if stored == torch.int8 else ""
        prepare, attend = _functions(
            self.engine, stored, self.queries.dtype, self.queries.shape[3], plan.tile, plan.lanes, integers
        )
        ranges_lse = []
        for first in range(0, each * len(segments), at_once):
            ranges = (first, min(at_once, each * len(segments) - first), each, range_keys, block)
            queries = (*plan.counts, self.is_first, self.first, plan.scale)
            arguments = array("q", (0, table.buffer_info()[0], *ranges, *queries, *memory, *tensors))
            address = arguments.buffer_info()[0]
            if first == 0:
                prepare(address)
                self.is_first = False
            attend(address)
            if self.told is not None:
                ranges_lse.append(_range_lse(states, plan, self.queries, ranges[1]))
        if self.told is not None:
            lse, last = torch.cat(ranges_lse, -1), torch.arange(each) * range_keys
            lengths = torch.tensor([segment.keys.shape[2] for segment in segments])
            self.told(segments, range_keys, lse.masked_fill_((last >= lengths[:, None]).flatten(), -torch.inf))


class Plan(NamedTuple):
    """What follows from shapes alone."""

    lanes: int
    tile: int
    unit_heads: int
    counts: tuple[int, ...]  # arguments from HEADS to TOKENS
    scale: int
    state_bytes: int
    fixed_bytes: int
    places: tuple[int, ...]  # of PREPARED to TOTALS in the memory that an attention keeps


def _range_lse(states: Tensor, plan: Plan, queries: Tensor, ranges: int) -> Tensor:
    """Log-sum-exp (H, T, ranges) from the states that code has left, of queries (1, H, T, D)."""
    rows, heads, tokens, head_dim = queries.shape
    assert rows == 1, "of one row only"
    count, padded = plan.counts[2:4]
    sums = states.view(torch.float32).view(-1, plan.unit_heads, plan.state_bytes // 4)[:ranges, :, padded * head_dim :]
    largest, total = (sums[:, :, n * padded : n * padded + count] for n in range(2))
    lse = torch.where(total > 0, largest + total.log2(), -torch.inf) * math.log(2)
    return lse.reshape(ranges, heads, tokens).permute(1, 2, 0)


@functools.lru_cache(maxsize=256)
def _plan(has_wide_registers: bool, shape: tuple[int, ...], key_rows: int, key_heads: int) -> Plan:
    rows, heads, tokens, head_dim = shape
    group, unit_heads = heads // key_heads, key_rows * key_heads
    count = rows // key_rows * group * tokens
    lanes, most = _registers(has_wide_registers, head_dim)
    tile = _tile(count, most)
    padded = -(-count // tile) * tile
    state_bytes = _lines(4 * padded * (head_dim + 2))
    totals = _lines(4 * unit_heads * padded * head_dim)
    positions = totals + unit_heads * state_bytes
    done = positions + 8 * padded
    return Plan(
        lanes,
        tile,
        unit_heads,
        (key_heads, unit_heads, count, padded, group, tokens),
        _scale(head_dim),
        state_bytes,
        done + 8 * unit_heads,
        (0, positions, done, totals),
    )


@functools.cache
def _functions(engine: Engine, stored: torch.dtype, queries: torch.dtype, *shape: Any) -> tuple[Function, Function]:
    """What prepares arguments, and what attends; `shape`: the rest of an AttentionForm."""
    return engine.attention(AttentionForm(dtype_name(stored), dtype_name(queries), *shape))


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Its address, and the bytes between its rows, heads and tokens."""
    row, head, token, *_ = x.stride()
    size = x.element_size()
    return x.data_ptr(), row * size, head * size, token * size


def _lines(size: int) -> int:
    return -(-size // LINE_BYTES) * LINE_BYTES


def _scale(head_dim: int) -> int:
    """The scale of scores, for weights that are powers of two, as the bits of a float64."""
    (bits,) = struct.unpack("q", struct.pack("d", head_dim**-0.5 * math.log2(math.e)))
    return int(bits)


def _tile(queries: int, most: int) -> int:
    """Queries that share what is read and converted, which costs about as much as two queries."""
    return min(range(1, most + 1), key=lambda tile: (-(-queries // tile) * (tile + 2), -tile))


def _registers(has_wide_registers: bool, head_dim: int) -> tuple[int, int]:
    """Lanes of vectors, and the most queries of a tile, whose sums are kept in registers."""
    if has_wide_registers:
        return (16, 5) if head_dim % 32 == 0 else (8, 5)
    return 8, 3
