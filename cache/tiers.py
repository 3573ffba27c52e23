"""Where a NoPE layer's sealed blocks lie, device, host memory or disk, and how they reach attention.

The newest are kept nearest: `Residency` says how many. Segments on disk are read ahead by background threads into
reused buffers; the next one is copied to an accelerator while the current one is in use. Results do not depend on the
tier. What needs an accelerator has not been run on one yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cache.blocks import Block, empty_block
from cache.disk import UnitFile, Units
from cache.layout import KV_DTYPES, StoreLayout
from cache.packing import Packed, pack, packed_from_bytes, unpack
from cache.residency import READ_BUFFERS, Residency
from model.kernels.attend import KVSegment
from model.weights.read_ahead import ahead, as_bytes

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

    def write(self, row: int, units: Units) -> UnitFile:
        """Writes a row: a unit for each segment of each layer, named by `unit_name`."""
        ...


def unit_name(layer: int, segment: int) -> str:
    return f"{layer}.{segment}"


class SealedBlock:
    """An immutable block of one NoPE layer: its segments in memory, in a file, or both. Shared by forks."""

    def __init__(self, layer: int, segments: Sequence[Packed | None], file: UnitFile | None = None) -> None:
        self.layer = layer
        self.segments = list(segments)
        self.views: dict[int, KVSegment] = {}  # of segments in memory, by number
        self.file = file
        self.was_read = False  # all of it, from the file: what is read a second time is worth keeping in memory

    @property
    def is_in_memory(self) -> bool:
        return any(segment is not None for segment in self.segments)

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes in host memory, or else on an accelerator."""
        return sum(
            packed.nbytes
            for packed in self.segments
            if packed is not None and (packed.keys.device.type == "cpu") == on_host
        )

    def move(self, place: Callable[[Packed], Packed]) -> None:
        for number, packed in enumerate(self.segments):
            if packed is not None:
                self.segments[number] = place(packed)
        self.views.clear()

    def drop_from_memory(self) -> None:
        assert self.file is not None, "the only copy"
        self.segments = [None] * len(self.segments)
        self.views.clear()


class Loan(NamedTuple):
    """A sealed segment to fetch, and whether it stays in memory once it is there."""

    block: SealedBlock
    number: int
    is_kept: bool


class Tiers:
    """What the layers and forks of a cache share: the layout, the buffers, and the thread that reads ahead."""

    def __init__(self, layout: StoreLayout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self._pins = device.type == "cuda"
        self._read_buffers: list[Tensor] = []
        self._unpacked: dict[torch.device, Block] = {}
        self._readers: ThreadPoolExecutor | None = None
        self._pending: list[Future[Packed]] = []

    def seal(self, layer: int, segments: Iterable[Block]) -> SealedBlock:
        """Packs the open segments of a full block, on their device."""
        return SealedBlock(layer, [pack(segment, self.layout) for segment in segments])

    def to_host(self, packed: Packed) -> Packed:
        """The segment in host memory, pinned if it comes from an accelerator."""
        if packed.keys.device.type == "cpu":
            return packed
        return packed.to(lambda x: torch.empty_like(x, device="cpu", pin_memory=self._pins).copy_(x))

    def prepare(self, *, reads: bool, has_sealed: bool) -> None:
        """Allocates the buffers that the closed form counts, before they are needed."""
        if reads and not self._read_buffers:
            size = self.layout.sealed_segment_bytes
            self._read_buffers = [
                torch.empty(size, dtype=torch.uint8, pin_memory=self._pins) for _ in range(READ_BUFFERS)
            ]
        if has_sealed and self.layout.is_packed:
            self._unpack_buffer(self.device)

    @property
    def buffer_bytes(self) -> int:
        return sum(x.nbytes for x in self._read_buffers) + sum(block.nbytes for block in self._unpacked.values())

    def stream(
        self, blocks: Sequence[SealedBlock], residency: Residency, num_queries: int, rows: range | None = None
    ) -> Iterator[KVSegment]:
        """The blocks' segments, oldest first, as they are stored, where they are attended: of `rows`, or all.

        A block that `residency` places in memory stays there from its second read on, so that the first answer does not
        wait for memory to fill.
        """
        _, _, on_disk = residency.split(len(blocks))
        rows = range(len(blocks)) if rows is None else rows
        places = [(row, number) for row in rows for number in range(self.layout.segments_per_block)]
        fetched = self._fetched(
            Loan(blocks[row], number, row >= on_disk and blocks[row].was_read) for row, number in places
        )
        if self.device.type != "cpu" and not stays_on_host(self.layout, num_queries):
            fetched = self._on_device(fetched)
        for (row, number), packed in zip(places, fetched, strict=True):
            block, start = blocks[row], row * self.layout.block_tokens + number * self.layout.segment_tokens
            if block.segments[number] is not packed:  # in a buffer that others will use
                yield self._segment_of(packed, start)
                continue
            view = block.views.get(number)
            if view is None or view.keys is not packed.keys:
                view = block.views[number] = self._segment_of(packed, start, stays=True)
            yield view

    def _segment_of(self, packed: Packed, start: int, *, stays: bool = False) -> KVSegment:
        unpack = functools.partial(self._unpacked_form, packed) if self.layout.is_packed else None
        return KVSegment(*packed[:2], start, packed.key_scales, packed.value_scales, unpack, stays)

    def _unpacked_form(self, packed: Packed) -> Block:
        return unpack(packed, self.layout, self._unpack_buffer(packed.keys.device))

    def load(self, block: SealedBlock, number: int) -> Block:
        """One segment in the compute dtype, in its own memory."""
        packed = block.segments[number]
        if packed is None:
            packed = self._read(block, number, self._room())
        if not self.layout.is_packed:
            return Block(packed.keys, packed.values)
        return unpack(packed, self.layout, self._segment(packed.keys.device))

    def _fetched(self, loans: Iterable[Loan]) -> Iterator[Packed]:
        """Packed segments in memory; those on disk are read ahead in the background. One stream at a time."""
        wait(self._pending)  # an abandoned stream's reads still write into the buffers
        self._pending.clear()
        reads = 0

        def begin(loan: Loan) -> Packed | Future[Packed]:
            nonlocal reads
            packed = loan.block.segments[loan.number]
            if packed is not None:
                return packed
            if loan.is_kept:
                return self._in_background(self._keep, loan.block, loan.number)
            self.prepare(reads=True, has_sealed=False)
            buffer = self._read_buffers[reads % READ_BUFFERS]
            reads += 1
            return self._in_background(self._read, loan.block, loan.number, buffer)

        for begun in ahead(loans, begin, READ_BUFFERS - 1):
            if isinstance(begun, Future):
                packed = begun.result()
                self._pending.remove(begun)  # not earlier: after an interrupt it must be waited for
                yield packed
            else:
                yield begun

    def _in_background(
        self,
        work: Callable[[SealedBlock, int, Tensor], Packed],
        block: SealedBlock,
        number: int,
        buffer: Tensor | None = None,
    ) -> Future[Packed]:
        if self._readers is None:
            self._readers = ThreadPoolExecutor(max_workers=READ_BUFFERS - 1, thread_name_prefix="read-ahead")
        begun = self._readers.submit(work, block, number, self._room() if buffer is None else buffer)
        self._pending.append(begun)
        return begun

    def _read(self, block: SealedBlock, number: int, buffer: Tensor) -> Packed:
        assert block.file is not None, "neither in memory nor on disk"
        block.file.read(unit_name(block.layer, number), as_bytes(buffer))
        block.was_read |= number == len(block.segments) - 1
        return packed_from_bytes(buffer, self.layout)

    def _keep(self, block: SealedBlock, number: int, buffer: Tensor) -> Packed:
        packed = self._read(block, number, buffer)
        block.segments[number] = packed
        return packed

    def _room(self) -> Tensor:
        """Memory for a packed segment that is kept."""
        return torch.empty(self.layout.sealed_segment_bytes, dtype=torch.uint8, pin_memory=self._pins)

    def _segment(self, device: torch.device) -> Block:
        return empty_block(self.layout, self.layout.segment_tokens, device)

    def _unpack_buffer(self, device: torch.device) -> Block:
        if device not in self._unpacked:
            self._unpacked[device] = self._segment(device)
        return self._unpacked[device]

    def _on_device(self, fetched: Iterator[Packed]) -> Iterator[Packed]:
        """The segments on the accelerator: the next one is copied while attention reads the current one."""
        stream = torch.cuda.Stream(self.device)

        def send(packed: Packed) -> tuple[Packed, torch.cuda.Event]:
            with torch.cuda.stream(stream):
                copies = packed.to(lambda x: x.to(self.device, non_blocking=True))
            arrived = stream.record_event()
            arrived.synchronize()  # its host buffer is read into next
            return copies, arrived

        for copies, arrived in ahead(fetched, send):
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for _, x in copies.tensors:
                x.record_stream(current)  # else its memory could be reused while attention reads it
            yield copies
