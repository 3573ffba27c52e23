"""Closed-form bytes of keys and values by layer kind and tier. Imports no torch, so that plans are quick.

What is computed here is what `HybridKVCache` holds, to the byte; a test compares the two.

A NoPE layer's store is cut twice: into blocks, which are sealed, moved and written as one, and into segments, which
attention visits one at a time. Both are cut at multiples of the attention chunk and depend on the model and the dtype
alone, never on budgets, so that results do not depend on where a block lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from model.config import TextConfig

MIN_BLOCK_BYTES = 16 * 2**20
"""A NoPE layer's block is not smaller, so that short attention chunks do not make thousands of files."""

MIN_SEGMENT_BYTES, MIN_SEGMENT_TOKENS = 4 * 2**20, 8192
"""A segment is not smaller (but for a whole block): fewer, larger reads, and fewer partial results to merge."""

READ_BUFFERS = 3
"""Segments in flight from disk: one in use, the next two on their way."""

KV_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
"""Storage types of sealed blocks, with bytes an element."""

QUANTIZED = ("fp8", "int8")
MAX_GROUP_TOKENS = 64
SCALE_BYTES = 4


@dataclass(frozen=True)
class KVBytes:
    """Bytes of keys and values: RoPE windows, NoPE blocks by the tier they are held in, and what serves the reading."""

    rope_windows: int
    nope_device: int
    nope_host: int
    nope_disk: int = 0  # in files, whether or not a copy is in memory
    buffers: int = 0  # host memory through which blocks on disk, and packed ones, reach attention

    @property
    def nope(self) -> int:
        """Of the NoPE layers, in memory."""
        return self.nope_device + self.nope_host

    @property
    def total(self) -> int:
        """In memory, of every tier and owner."""
        return self.rope_windows + self.nope + self.buffers


@dataclass(frozen=True)
class Residency:
    """How many of the newest sealed blocks of each NoPE layer each tier of memory keeps; older ones move down.

    `device_rows` are kept on an accelerator, `host_rows` older ones in host memory (None: all of them), the rest on
    disk. A row is one block of every NoPE layer. Without an accelerator there are no device rows.
    """

    host_rows: int | None = None
    device_rows: int = 0
    on_accelerator: bool = False

    def split(self, sealed: int) -> tuple[int, int, int]:
        """Of `sealed` rows, how many are on the device, in host memory, and on disk alone."""
        device = min(sealed, self.device_rows)
        host = sealed - device if self.host_rows is None else min(sealed - device, self.host_rows)
        return device, host, sealed - device - host


@dataclass(frozen=True)
class StoreLayout:
    """Shapes and bytes of a run's keys and values. `dtype` is what the model computes in, `kv_dtype` what sealed blocks
    are stored in; both by name. Windows and the open block are always in `dtype`. Sizes in tokens, B rows."""

    config: TextConfig
    length: int
    dtype: str
    kv_dtype: str
    batch_size: int
    block_tokens: int
    segment_tokens: int

    @classmethod
    def of(
        cls, config: TextConfig, *, length: int, dtype: str, kv_dtype: str = "auto", batch_size: int = 1
    ) -> StoreLayout:
        """The layout of a run of at most `length` tokens; kv_dtype "auto" is `dtype`."""
        assert dtype in KV_DTYPES and dtype not in QUANTIZED, dtype
        kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
        assert kv_dtype in KV_DTYPES, kv_dtype
        itemsize = KV_DTYPES[dtype]
        return cls(
            config,
            length,
            dtype,
            kv_dtype,
            batch_size,
            block_tokens(config, itemsize, batch_size),
            segment_tokens(config, itemsize, batch_size),
        )

    def computed_in(self, dtype: str) -> StoreLayout:
        """The same store for a model that computes in `dtype`: cut in the same places, stored in the same type."""
        return replace(self, dtype=dtype)

    @property
    def is_packed(self) -> bool:
        """Whether sealed blocks are stored otherwise than computed with, so that each is unpacked when it is read."""
        return self.kv_dtype != self.dtype

    @cached_property
    def group_tokens(self) -> int:
        """Consecutive tokens that share the scales of a quantized type: the largest divisor of a segment up to 64."""
        return max(n for n in range(1, MAX_GROUP_TOKENS + 1) if self.segment_tokens % n == 0)

    @property
    def segments_per_block(self) -> int:
        return self.block_tokens // self.segment_tokens

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer, in `dtype`."""
        return layer_bytes_per_token(self.config, KV_DTYPES[self.dtype], self.batch_size)

    @property
    def segment_bytes(self) -> int:
        """One layer's segment in `dtype`."""
        return self.segment_tokens * self.token_bytes

    @property
    def scale_bytes(self) -> int:
        """Scales of one layer's sealed segment: for keys one a channel and token group, for values one a token."""
        if self.kv_dtype not in QUANTIZED:
            return 0
        groups = self.segment_tokens // self.group_tokens
        scales = groups * self.config.head_dim + self.segment_tokens  # of one head
        return self.batch_size * self.config.num_key_value_heads * scales * SCALE_BYTES

    @property
    def sealed_segment_bytes(self) -> int:
        """One layer's segment as it is stored once sealed."""
        elements = layer_bytes_per_token(self.config, 1, self.batch_size) * self.segment_tokens
        return elements * KV_DTYPES[self.kv_dtype] + self.scale_bytes

    @property
    def row_bytes(self) -> int:
        """One sealed block of every NoPE layer."""
        return self.config.num_nope_layers * self.segments_per_block * self.sealed_segment_bytes

    @property
    def window_bytes(self) -> int:
        """The RoPE layers' windows: never more than one attention chunk each."""
        window = min(self.config.attention_chunk_size, self.length)
        return self.config.num_rope_layers * window * self.token_bytes

    def open_bytes(self, tokens: int) -> int:
        """The NoPE layers' segments that hold `tokens` tokens behind the last sealed block, unused parts included."""
        segments = -(-tokens // self.segment_tokens)
        return self.config.num_nope_layers * segments * self.segment_bytes

    def sealed_rows(self, tokens: int) -> int:
        return tokens // self.block_tokens

    def buffer_bytes(self, disk_rows: int, sealed_rows: int) -> int:
        """Read buffers if anything is on disk alone, and one segment to unpack into if blocks are packed."""
        read = READ_BUFFERS * self.sealed_segment_bytes if disk_rows else 0
        return read + (self.segment_bytes if self.is_packed and sealed_rows else 0)

    def held(self, tokens: int, residency: Residency = Residency(), *, all_on_disk: bool = False) -> KVBytes:
        """Bytes after `tokens` committed tokens. `all_on_disk`: every sealed block is written, as saved contexts do."""
        rows = self.sealed_rows(tokens)
        device, host, disk = residency.split(rows)
        open_tokens = tokens - rows * self.block_tokens
        last = self.length - rows * self.block_tokens  # the last segment is not larger than the run
        open_bytes = min(self.open_bytes(open_tokens), self.config.num_nope_layers * last * self.token_bytes)
        on_device = device * self.row_bytes + (open_bytes if residency.on_accelerator else 0)
        on_host = host * self.row_bytes + (0 if residency.on_accelerator else open_bytes)
        return KVBytes(
            self.window_bytes,
            on_device,
            on_host,
            nope_disk=(rows if all_on_disk else disk) * self.row_bytes,
            buffers=self.buffer_bytes(rows if all_on_disk else disk, rows),
        )

    def peak(
        self, tokens: int, step_tokens: int, residency: Residency = Residency(), *, all_on_disk: bool = False
    ) -> KVBytes:
        """The most that a run of `tokens` in the driver's steps of up to `step_tokens` holds: before its last block is
        sealed, or at the end. One layer's packed block, while it is made, is not counted."""
        end = self.held(tokens, residency, all_on_disk=all_on_disk)
        rows = self.sealed_rows(tokens)
        if rows == 0:
            return end
        stepped = min(rows, max(1, -(-step_tokens // self.block_tokens)))  # open before the last step's are sealed
        sealed_before = (rows - stepped) * self.block_tokens
        before = self.held(sealed_before, residency)
        behind = tokens % self.block_tokens if step_tokens > self.block_tokens else 0
        full = min(
            self.open_bytes(stepped * self.block_tokens + behind),
            self.config.num_nope_layers * (self.length - sealed_before) * self.token_bytes,
        )
        device, host = (full, 0) if residency.on_accelerator else (0, full)
        return KVBytes(
            end.rope_windows,
            max(end.nope_device, before.nope_device + device),
            max(end.nope_host, before.nope_host + host),
            end.nope_disk,
            end.buffers,
        )

    def rows_within(self, budget: int, step_tokens: int, *, is_open_here: bool, is_read_here: bool) -> int:
        """Sealed rows that fit into `budget` bytes of one tier beside its open blocks and its read buffers."""
        blocks = max(1, -(-step_tokens // self.block_tokens)) + (step_tokens > self.block_tokens)
        taken = self.open_bytes(min(self.length, blocks * self.block_tokens)) if is_open_here else 0
        taken += self.buffer_bytes(1, 1) if is_read_here else 0
        return max(0, (budget - taken) // self.row_bytes) if self.row_bytes else 0


def layer_bytes_per_token(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Keys and values of one token in one layer; `itemsize` in bytes an element."""
    return 2 * batch_size * config.num_key_value_heads * config.head_dim * itemsize


def bytes_per_token(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """What each further token adds for good: keys and values of the NoPE layers."""
    return config.num_nope_layers * layer_bytes_per_token(config, itemsize, batch_size)


def block_tokens(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Tokens in a NoPE block: the least multiple of the attention chunk that fills MIN_BLOCK_BYTES."""
    chunk_bytes = config.attention_chunk_size * layer_bytes_per_token(config, itemsize, batch_size)
    return config.attention_chunk_size * -(-MIN_BLOCK_BYTES // chunk_bytes)


def segment_tokens(config: TextConfig, itemsize: int, batch_size: int = 1) -> int:
    """Tokens in a segment: the least whole share of a block, in attention chunks, that is not too small."""
    block = block_tokens(config, itemsize, batch_size)
    least = max(MIN_SEGMENT_TOKENS, math.ceil(MIN_SEGMENT_BYTES / layer_bytes_per_token(config, itemsize, batch_size)))
    chunks = block // config.attention_chunk_size
    shares = (n * config.attention_chunk_size for n in range(1, chunks + 1) if chunks % n == 0)
    return next((tokens for tokens in shares if tokens >= least), block)


def unbounded_bytes(config: TextConfig, tokens: int, itemsize: int, batch_size: int = 1) -> int:
    """What a cache that keeps every layer's keys and values would take."""
    return tokens * config.num_hidden_layers * layer_bytes_per_token(config, itemsize, batch_size)
