"""Where a NoPE layer's sealed blocks lie, device, host memory or disk, and how they reach attention.

The newest are kept nearest: `Residency` says how many. Segments on disk are read ahead by background threads into
reused buffers; the next one is copied to an accelerator while the current one is in use. Results do not depend on the
tier. What needs an accelerator goes through `Transport`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import torch

from cache.blocks import Block, empty_block
from cache.disk import UnitFile, Units
from cache.layout import KV_DTYPES, StoreLayout
from cache.packing import Packed, pack, packed_from_bytes, unpack
from cache.pinned import PinnedTransport
from cache.residency import READ_BUFFERS, Residency
from cache.ring import Fetched, ReadBuffer, Ring, copies, enter, host_copy, leave
from cache.sealed import SealedBlock
from model.kernels.attend import KVSegment
from model.weights.read_ahead import ahead, as_bytes
from model.weights.transport import Transport

HOST_OPERATIONS = 64
"""Operations of attention that a host is assumed to do while one byte crosses to the accelerator: 1.6 TFLOP/s and 25
GB/s, as of 16 cores and half of a PCIe 4.0 link."""


def stays_on_host(layout: StoreLayout, num_queries: int) -> bool:
    """Whether so many queries (all heads) had better travel to a segment in host memory than the segment to them.

    Compared in bytes of the link: the queries and their results with float32 log-sum-exps, and the host's arithmetic
    as bytes that would cross meanwhile, against the segment as it is stored.
    """
    config, itemsize = layout.config, KV_DTYPES[layout.dtype]
    heads = num_queries * config.num_attention_heads
    moved = heads * (config.head_dim * (itemsize + 4) + 4)
    computed = 4 * heads * config.head_dim * layout.segment_tokens // HOST_OPERATIONS
    return moved + computed < layout.sealed_segment_bytes


class RowStore(Protocol):
    """Where rows of sealed blocks are written: a scratch file, or a saved context."""

    is_durable: bool
    """Whether every row must be written as soon as it is sealed."""

    def write(self, row: int, units: Units) -> UnitFile | None:
        """Writes a row: a unit for each segment of each layer, named by `unit_name`. None: later, so the row stays in
        memory."""
        ...


def unit_name(layer: int, segment: int) -> str:
    return f"{layer}.{segment}"


class Loan(NamedTuple):
    """A sealed segment to fetch, and whether it stays in memory once it is there."""

    block: SealedBlock
    number: int
    is_kept: bool


class Tiers:
    """What the layers and forks of a cache share: the layout, the buffers, and the thread that reads ahead."""

    def __init__(self, layout: StoreLayout, device: torch.device, transport: Transport | None = None) -> None:
        """`transport` leads to an accelerator; None on a CPU."""
        self.layout, self.device = layout, device
        self.transport = None if transport is None else PinnedTransport(transport, layout)
        self._read_buffers: list[ReadBuffer] = []
        self._ring: Ring | None = None
        self._unpacked: dict[torch.device, Block] = {}
        self._readers: ThreadPoolExecutor | None = None
        self._pending: list[Future[Packed]] = []

    @property
    def is_accelerated(self) -> bool:
        return self.transport is not None

    def seal(self, layer: int, segments: Iterable[Block]) -> SealedBlock:
        """Packs the open segments of a full block, on their device."""
        packed = [pack(segment, self.layout) for segment in segments]
        return SealedBlock(layer, packed, is_on_device=self.transport is not None)

    def to_host(self, block: SealedBlock) -> None:
        """Begins to move a block from an accelerator to host memory."""
        if self.transport is not None and block.is_on_device:
            leave(block, self.layout, self.transport)

    def copies_on_host(self, block: SealedBlock) -> list[Packed | None]:
        """Its segments in host memory, there already: the block's own or, of one on an accelerator, copies."""
        if self.transport is None or not block.is_on_device:
            self._finish(block)
            return block.segments
        found = [
            None if packed is None else host_copy(packed, self.layout, self.transport) for packed in block.segments
        ]
        both = zip(found, block.segments, strict=True)
        wanted = [copy for new, old in both if new is not None and old is not None for copy in copies(new, old)]
        self.transport.finish(self.transport.send(wanted, self.transport.mark(), *block.arrived))
        return found

    def prepare(self, *, reads: bool, streams: bool, has_sealed: bool) -> None:
        """Allocates the buffers that the closed form counts, before they are needed. `streams`: to an accelerator."""
        if reads and not self._read_buffers:
            self._read_buffers = [self._room() for _ in range(READ_BUFFERS)]
        if has_sealed and self.layout.is_packed:
            self._unpack_buffer(self.device)
            self._unpack_buffer(torch.device("cpu"))  # of segments that are attended there
        if streams and self.transport is not None and self._ring is None:
            self._ring = Ring(self.layout, self.transport)

    def pin(self, slots: int) -> None:
        """Takes pinned host memory for so many segments, with what has been taken, if there is an accelerator."""
        if self.transport is not None:
            self.transport.grow(slots)

    @property
    def pinned(self) -> tuple[int, int]:
        """Bytes that `pin` has taken, and how many of these the system did not pin."""
        return (0, 0) if self.transport is None else (self.transport.nbytes, self.transport.refused)

    def buffer_bytes(self, *, on_host: bool) -> int:
        """Bytes of buffers in host memory, of which are slots without a block, or else on an accelerator."""
        read = sum(buffer.data.nbytes for buffer in self._read_buffers) if on_host else 0
        ring = self._ring.nbytes if self._ring is not None and not on_host else 0
        unpacked = [block for device, block in self._unpacked.items() if (device.type == "cpu") == on_host]
        slots = self.pinned[0] - self._slots_in_use * self.layout.sealed_segment_bytes if on_host else 0
        return read + slots + ring + sum(block.nbytes for block in unpacked)

    def stream(
        self, blocks: Sequence[SealedBlock], residency: Residency, num_queries: int, rows: range | None = None
    ) -> Iterator[KVSegment]:
        """The blocks' segments, oldest first, as they are stored, where they are attended: of `rows`, or all.

        A block that `residency` places in memory stays there from its second read on, so that the first answer does not
        wait for memory to fill.
        """
        on_device, _, on_disk = residency.split(len(blocks))
        rows = range(len(blocks)) if rows is None else rows
        places = [(row, number) for row in rows for number in range(self.layout.segments_per_block)]
        for block in blocks[len(blocks) - on_device :]:
            self._promote(block)
        loans = (Loan(blocks[row], number, row >= on_disk and blocks[row].was_read) for row, number in places)
        fetched = self._where_attended(self._fetched(loans), num_queries)
        for (row, number), packed in zip(places, fetched, strict=True):
            block, start = blocks[row], row * self.layout.block_tokens + number * self.layout.segment_tokens
            if block.segments[number] is not packed:  # in a buffer that others will use
                yield self._segment_of(packed, start)
            else:
                view = block.views.get(number)
                if view is None or view.keys is not packed.keys:
                    view = block.views[number] = self._segment_of(packed, start, stays=True)
                yield view
            if number == self.layout.segments_per_block - 1 and row >= len(blocks) - on_device:
                self._promote(block)  # at once, so that host memory holds one such block and not all

    def _segment_of(self, packed: Packed, start: int, *, stays: bool = False) -> KVSegment:
        unpack = functools.partial(self._unpacked_form, packed) if self.layout.is_packed else None
        return KVSegment(*packed[:2], start, packed.key_scales, packed.value_scales, unpack, stays)

    def _unpacked_form(self, packed: Packed) -> Block:
        return unpack(packed, self.layout, self._unpack_buffer(packed.keys.device))

    def read(self, block: SealedBlock, number: int) -> Packed:
        """One segment of a block's file, in its own memory. Raises DiskError."""
        return self._read(block, number, self._room())

    def load(self, block: SealedBlock, number: int) -> Block:
        """One segment in the compute dtype, in its own memory."""
        self._finish(block)
        packed = block.segments[number]
        if packed is None:
            packed = self.read(block, number)
        if not self.layout.is_packed:
            return Block(packed.keys, packed.values)
        return unpack(packed, self.layout, self._segment(packed.keys.device))

    def _where_attended(self, fetched: Iterator[Fetched], num_queries: int) -> Iterator[Packed]:
        if self.transport is not None and not stays_on_host(self.layout, num_queries):
            self.prepare(reads=False, streams=True, has_sealed=False)
            assert self._ring is not None
            yield from self._ring.passing(fetched)
            return
        for item in fetched:
            self._finish(item.block)
            yield item.packed

    def where_computed(self, block: SealedBlock) -> list[Packed] | None:
        """Its segments, if all are in memory where the model computes, in its dtype; what is computed from now on waits
        for those that are on their way."""
        found = [segment for segment in block.segments if segment is not None]
        if self.layout.is_packed or len(found) < len(block.segments):
            return None
        if self.transport is not None and not block.is_on_device:
            return None
        self._finish(block)
        return found

    def _finish(self, block: SealedBlock) -> None:
        """What is read from now on is there: the host waits for what is on its way to it."""
        if self.transport is not None and block.arrived:
            for event in block.arrived:
                self.transport.wait(event) if block.is_on_device else self.transport.finish(event)
            block.has_arrived()

    def _promote(self, block: SealedBlock) -> None:
        """Begins to move a block from host memory to the accelerator, once it has been read as a whole."""
        if self.transport is not None and not block.is_on_device and None not in block.segments:
            enter(block, self.transport)

    def _fetched(self, loans: Iterable[Loan]) -> Iterator[Fetched]:
        """Packed segments in memory; those on disk are read ahead in the background. One stream at a time."""
        wait(self._pending)  # an abandoned stream's reads still write into the buffers
        self._pending.clear()
        reads = 0

        def begin(loan: Loan) -> Fetched | tuple[Loan, ReadBuffer | None, Future[Packed]]:
            nonlocal reads
            packed = loan.block.segments[loan.number]
            if packed is not None:
                return Fetched(loan.block, packed)
            if loan.is_kept:
                return loan, None, self._in_background(self._keep, loan.block, loan.number, self._room())
            self.prepare(reads=True, streams=False, has_sealed=False)
            buffer = self._read_buffers[reads % READ_BUFFERS]
            reads += 1
            return loan, buffer, self._in_background(self._read, loan.block, loan.number, buffer)

        for begun in ahead(loans, begin, READ_BUFFERS - 1):
            if isinstance(begun, Fetched):
                yield begun
                continue
            loan, buffer, reading = begun
            packed = reading.result()
            self._pending.remove(reading)  # not earlier: after an interrupt it must be waited for
            yield Fetched(loan.block, packed, buffer)

    def _in_background(
        self, work: Callable[[SealedBlock, int, ReadBuffer], Packed], block: SealedBlock, number: int, into: ReadBuffer
    ) -> Future[Packed]:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(max_workers=READ_BUFFERS - 1, thread_name_prefix="read-ahead")
        begun = self._readers.submit(work, block, number, into)
        self._pending.append(begun)
        return begun

    def _read(self, block: SealedBlock, number: int, buffer: ReadBuffer) -> Packed:
        assert block.file is not None, "neither in memory nor on disk"
        if self.transport is not None:
            for event in buffer.copied:  # in the reader's thread: what computes does not wait
                self.transport.finish(event)
        block.file.read(unit_name(block.layer, number), as_bytes(buffer.data))
        block.was_read |= number == len(block.segments) - 1
        return packed_from_bytes(buffer.data, self.layout)

    def _keep(self, block: SealedBlock, number: int, buffer: ReadBuffer) -> Packed:
        packed = self._read(block, number, buffer)
        block.segments[number] = packed
        return packed

    def _room(self) -> ReadBuffer:
        """Host memory for a packed segment."""
        size = self.layout.sealed_segment_bytes
        if self.transport is None:
            return ReadBuffer(torch.empty(size, dtype=torch.uint8))
        slot = self.transport.slot()
        return ReadBuffer(self.transport.host_memory(size)) if slot is None else ReadBuffer(*slot)

    @property
    def _slots_in_use(self) -> int:
        return 0 if self.transport is None else self.transport.slots_in_use

    def _segment(self, device: torch.device) -> Block:
        return empty_block(self.layout, self.layout.segment_tokens, device)

    def _unpack_buffer(self, device: torch.device) -> Block:
        if device not in self._unpacked:
            self._unpacked[device] = self._segment(device)
        return self._unpacked[device]
