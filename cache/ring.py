"""How sealed segments move between host memory and an accelerator while it computes.

Those that do not stay there pass through a ring of buffers, one after the other: the next one is copied while the
present one is attended. Nothing here makes the host wait; events order copies and computing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.layout import StoreLayout
from cache.packing import Packed, packed_from_bytes
from cache.pinned import PinnedTransport
from cache.residency import RING_BUFFERS
from cache.sealed import SealedBlock
from model.weights.read_ahead import ahead
from model.weights.transport import Copies, Transport


class Fetched(NamedTuple):
    """A sealed segment in memory, and the read buffer that holds it, if it is not the block's own."""

    block: SealedBlock
    packed: Packed
    buffer: ReadBuffer | None = None


@dataclass(eq=False)
class ReadBuffer:
    """Host memory (sealed_segment_bytes,) that segments on disk are read into, and the event of its last copy."""

    data: Tensor
    copied: tuple[Any, ...] = ()


@dataclass(eq=False)
class Slot:
    """A buffer on the device, and what has to happen before it is overwritten."""

    data: Tensor
    free: tuple[Any, ...] = ()


class Ring:
    """The buffers on the device. One stream of segments at a time; it may be abandoned."""

    def __init__(self, layout: StoreLayout, transport: Transport) -> None:
        self._layout, self._transport = layout, transport
        self._slots = [
            Slot(torch.empty(layout.sealed_segment_bytes, dtype=torch.uint8, device=transport.device))
            for _ in range(RING_BUFFERS)
        ]
        for slot in self._slots:  # the memory may have been that of something which is still being computed
            slot.free = (transport.mark(),)

    @property
    def nbytes(self) -> int:
        return sum(slot.data.nbytes for slot in self._slots)

    def passing(self, fetched: Iterable[Fetched]) -> Iterator[Packed]:
        """Each segment on the device, valid until the next one is asked for; as it is, where it is there already."""
        sent = 0

        def send(item: Fetched) -> tuple[Fetched, Packed, Slot | None, Any]:
            nonlocal sent
            if item.block.is_on_device:
                return item, item.packed, None, None
            slot = self._slots[sent % RING_BUFFERS]
            sent += 1
            target = packed_from_bytes(slot.data, self._layout)
            arrived = self._transport.send(copies(target, item.packed), *slot.free, *item.block.arrived)
            slot.free = (arrived,)
            if item.buffer is not None:
                item.buffer.copied = (arrived,)
            return item, target, slot, arrived

        for item, packed, slot, arrived in ahead(fetched, send):
            if slot is None:
                for event in item.block.arrived:
                    self._transport.wait(event)
                yield packed
                continue
            self._transport.wait(arrived)
            try:
                yield packed
            finally:
                slot.free = (self._transport.mark(slot.data),)


def copies(target: Packed, source: Packed) -> Copies:
    return [(into, tensor) for (_, into), (_, tensor) in zip(target.tensors, source.tensors, strict=True)]


def host_copy(packed: Packed, layout: StoreLayout, transport: PinnedTransport) -> Packed:
    """Host memory for a segment, not filled yet."""
    slot = transport.slot()
    if slot is None:
        return packed.to(lambda x: transport.host_memory(x.nbytes).view(x.dtype).view(x.shape))
    return packed_from_bytes(slot[0], layout)


def leave(block: SealedBlock, layout: StoreLayout, transport: PinnedTransport) -> None:
    """Begins to move a block to host memory. What is on the device is kept until it has been copied."""
    on_host = [None if packed is None else host_copy(packed, layout, transport) for packed in block.segments]
    _move(block, on_host, transport, is_on_device=False)


def enter(block: SealedBlock, transport: Transport) -> None:
    """Begins to move a block to the device."""
    on_device = [
        None if x is None else x.to(lambda t: torch.empty_like(t, device=transport.device)) for x in block.segments
    ]
    _move(block, on_device, transport, is_on_device=True)


def _move(block: SealedBlock, targets: Sequence[Packed | None], transport: Transport, *, is_on_device: bool) -> None:
    both = [(new, old) for new, old in zip(targets, block.segments, strict=True) if new is not None and old is not None]
    wanted = [copy for new, old in both for copy in copies(new, old)]
    arrived = transport.send(wanted, transport.mark(), *block.arrived)
    block.move(targets, is_on_device=is_on_device, arrived=(arrived,))
