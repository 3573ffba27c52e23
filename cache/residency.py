"""Which tier holds the sealed blocks, and closed-form bytes of keys and values by layer kind and tier.

What is computed here is what `HybridKVCache` holds, to the byte; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cache.layout import StoreLayout

READ_BUFFERS = 3
"""Segments in flight from disk: one in use, the next two being read."""

RING_BUFFERS = 2
"""Segments on an accelerator that do not stay there: one that is attended, and the next one on its way."""

SLAB_BYTES = 2**28
"""Pinned memory is taken in slabs of at most this size, unless a segment is larger."""

SLOT_ALIGNMENT = 64
"""Bytes: segments in a slab begin at multiples, as in memory that torch returns."""


@dataclass(frozen=True)
class KVBytes:
    """Bytes of keys and values: RoPE windows, NoPE blocks by tier, and the buffers that blocks are read through."""

    rope_windows: int
    nope_device: int  # with the buffers there that segments from elsewhere pass through
    nope_host: int
    nope_disk: int = 0  # in files, whether or not a copy is in memory
    buffers: int = 0  # host memory through which blocks on disk, and packed ones, reach attention; unused pinned memory
    pinned: int = 0  # of host blocks and buffers together: memory that is pinned before it is needed

    @property
    def nope(self) -> int:
        """NoPE layers, in memory."""
        return self.nope_device + self.nope_host

    @property
    def total(self) -> int:
        """Everything in memory, on the device and on the host."""
        return self.rope_windows + self.nope + self.buffers


@dataclass(frozen=True)
class Residency:
    """How many of the newest sealed blocks of each NoPE layer each memory tier holds; older ones move down.

    The newest `device_rows` stay on the accelerator, the `host_rows` before them in host memory (None: all of them),
    the rest on disk. A row is one block of every NoPE layer. Without an accelerator there are no device rows.
    """

    host_rows: int | None = None
    device_rows: int = 0
    on_accelerator: bool = False

    def split(self, sealed: int) -> tuple[int, int, int]:
        """How many of `sealed` rows are on the device, in host memory, and on disk alone."""
        device = min(sealed, self.device_rows)
        host = sealed - device if self.host_rows is None else min(sealed - device, self.host_rows)
        return device, host, sealed - device - host


def buffer_bytes(layout: StoreLayout, disk_rows: int, sealed_rows: int) -> int:
    """Read buffers if any row is on disk alone, and one segment to unpack into if blocks are packed."""
    read = READ_BUFFERS * layout.sealed_segment_bytes if disk_rows else 0
    return read + (layout.segment_bytes if layout.is_packed and sealed_rows else 0)


def ring_bytes(layout: StoreLayout, streamed_rows: int, sealed_rows: int) -> int:
    """On an accelerator: buffers for segments that do not stay, if there are any, and one to unpack into."""
    ring = RING_BUFFERS * layout.sealed_segment_bytes if streamed_rows else 0
    return ring + (layout.segment_bytes if layout.is_packed and sealed_rows else 0)


def slot_bytes(layout: StoreLayout) -> int:
    """What a sealed segment takes of pinned memory."""
    return -(-layout.sealed_segment_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def slab_bytes(size: int) -> int:
    """What torch takes of the system for pinned memory of this size: the next power of two."""
    return 1 << (size - 1).bit_length()


def slab_slots(slots: int, slot_size: int) -> Iterator[int]:
    """Into slabs of how many slots these are divided: as many as fill a power of two best, the largest first."""
    size = max(SLAB_BYTES, slab_bytes(slot_size))
    while slots > 0:
        count = size // slot_size
        while slots >= count > 0:
            yield count
            slots -= count
        size //= 2


def pinned_bytes(slots: int, slot_size: int) -> int:
    """Of so many slots in slabs."""
    return sum(slab_bytes(count * slot_size) for count in slab_slots(slots, slot_size))


def pinned_slots(
    layout: StoreLayout, tokens: int, residency: Residency, layers: int, *, all_on_disk: bool = False
) -> int:
    """Segments in host memory beside an accelerator, at most, of so many NoPE layers: those of the blocks that stay
    there and, if any are in files, those that pass through."""
    rows = layout.sealed_rows(tokens)
    if not residency.on_accelerator or not layers:
        return 0
    _, host, disk = residency.split(rows)
    has_files = bool(rows if all_on_disk else disk)
    return host * layers * layout.segments_per_block + (passing_slots(layout, layers) if has_files else 0)


def passing_slots(layout: StoreLayout, layers: int) -> int:
    """Segments that pass through host memory between files and an accelerator: the read buffers, and a row that is
    written, or a block that is read to stay on the accelerator while the next one is being read.

    Each thread that reads may hold on to a segment for a moment after it has handed it over."""
    readers = READ_BUFFERS - 1
    read = layout.segments_per_block + READ_BUFFERS + readers
    return READ_BUFFERS + max(layers * layout.segments_per_block, read)


def held_bytes(
    layout: StoreLayout,
    tokens: int,
    residency: Residency = Residency(),
    *,
    all_on_disk: bool = False,
    slots: int = 0,
) -> KVBytes:
    """Bytes after `tokens` committed tokens. `all_on_disk`: every sealed block is written, as in a saved context.
    `slots`: so many segments of host memory were pinned before."""
    rows = layout.sealed_rows(tokens)
    device, host, disk = residency.split(rows)
    open_tokens = tokens - rows * layout.block_tokens
    last = layout.length - rows * layout.block_tokens  # the last segment is no longer than the run
    open_bytes = min(layout.open_bytes(open_tokens), layout.config.num_nope_layers * last * layout.token_bytes)
    on_device = device * layout.row_bytes
    if residency.on_accelerator:
        on_device += open_bytes + ring_bytes(layout, rows - device, rows)
    on_host = host * layout.row_bytes + (0 if residency.on_accelerator else open_bytes)
    pinned, on_disk = pinned_bytes(slots, slot_bytes(layout)), rows if all_on_disk else disk
    beside = buffer_bytes(layout, 0, rows) + pinned - on_host  # read buffers are slots
    return KVBytes(
        layout.window_bytes,
        on_device,
        on_host,
        nope_disk=on_disk * layout.row_bytes,
        buffers=beside if pinned else buffer_bytes(layout, on_disk, rows),
        pinned=pinned,
    )


def fork_bytes(layout: StoreLayout, room: int) -> int:
    """The most that a `ForkedKVCache` with room for so many tokens holds by itself: these, in every layer."""
    return layout.config.num_hidden_layers * room * layout.token_bytes


def peak_bytes(
    layout: StoreLayout,
    tokens: int,
    step_tokens: int,
    residency: Residency = Residency(),
    *,
    all_on_disk: bool = False,
    slots: int = 0,
) -> KVBytes:
    """The most that a run of `tokens` holds when the driver steps up to `step_tokens` at a time: before its last block
    is sealed, or at the end. One layer's packed block, while it is made, is not counted. Blocks on their way from an
    accelerator to the host are in both."""
    end = held_bytes(layout, tokens, residency, all_on_disk=all_on_disk, slots=slots)
    rows = layout.sealed_rows(tokens)
    if rows == 0:
        return end
    stepped = min(rows, max(1, -(-step_tokens // layout.block_tokens)))  # open until the last step's are sealed
    sealed_before = (rows - stepped) * layout.block_tokens
    before = held_bytes(layout, sealed_before, residency)
    behind = tokens % layout.block_tokens if step_tokens > layout.block_tokens else 0
    full = min(
        layout.open_bytes(stepped * layout.block_tokens + behind),
        layout.config.num_nope_layers * (layout.length - sealed_before) * layout.token_bytes,
    )
    device, host, leaving = (full, 0, 0) if residency.on_accelerator else (0, full, 0)
    if residency.on_accelerator:
        buffers = ring_bytes(layout, rows - residency.split(rows)[0], rows)
        device += buffers - ring_bytes(layout, rows - stepped - residency.split(rows - stepped)[0], rows - stepped)
        leaving = min(stepped, rows - residency.split(rows)[0]) * layout.row_bytes
    return KVBytes(
        end.rope_windows,
        leaving + max(end.nope_device, before.nope_device + device),
        max(end.nope_host, before.nope_host + host),
        end.nope_disk,
        end.buffers,
        end.pinned,
    )


def rows_within(layout: StoreLayout, budget: int, step_tokens: int, *, is_open_here: bool, is_read_here: bool) -> int:
    """Sealed rows that fit into `budget` bytes of one tier beside its open blocks and its read buffers."""
    blocks = max(1, -(-step_tokens // layout.block_tokens)) + (step_tokens > layout.block_tokens)
    taken = layout.open_bytes(min(layout.length, blocks * layout.block_tokens)) if is_open_here else 0
    taken += buffer_bytes(layout, 1, 1) if is_read_here else 0
    return max(0, (budget - taken) // layout.row_bytes) if layout.row_bytes else 0


def pinned_rows_within(layout: StoreLayout, budget: int) -> int:
    """Sealed rows that fit into `budget` bytes of host memory beside an accelerator and what files are read and written
    through."""
    layers, size = layout.config.num_nope_layers, slot_bytes(layout)
    per_row, passing = layers * layout.segments_per_block, passing_slots(layout, layers)
    left = budget - buffer_bytes(layout, 0, 1)
    rows = max(0, left // (per_row * size)) if per_row else 0
    while rows and pinned_bytes(rows * per_row + passing, size) > left:
        rows -= 1
    return rows


def device_rows_within(layout: StoreLayout, budget: int, step_tokens: int, rows: int) -> int:
    """Of a run's sealed `rows` those that stay on an accelerator within `budget` bytes: beside its open blocks and,
    unless all stay, beside the buffers that the others pass through and those that are just leaving."""

    def fitting(left: int) -> int:
        return rows_within(layout, left, step_tokens, is_open_here=True, is_read_here=False)

    if fitting(budget - ring_bytes(layout, 0, 1)) >= rows:
        return rows
    leaving = max(1, -(-step_tokens // layout.block_tokens)) * layout.row_bytes
    return min(rows - 1, fitting(budget - ring_bytes(layout, 1, 1) - leaving))
