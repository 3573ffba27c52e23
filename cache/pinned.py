"""Pinned host memory for packed segments, taken before it is needed: slots of one size, in slabs.

A slot is free again as soon as no tensor refers to it, whoever held it last. Copies from and to a slot are done one
after the other, so that a slot that is used again is not overwritten before what was begun with it is done.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from cache.layout import StoreLayout
from cache.residency import slab_bytes, slab_slots, slot_bytes
from model.weights.transport import Copies, Transport


class PinnedTransport:
    """A `Transport` with slots for one layout. Slots are taken by one thread, and may be given back by any."""

    def __init__(self, transport: Transport, layout: StoreLayout) -> None:
        self.device = transport.device
        self._segment_bytes, self._slot_bytes = layout.sealed_segment_bytes, slot_bytes(layout)
        self.nbytes = 0  # of all slabs
        self.refused = 0  # bytes of these that the system did not pin
        self._transport = transport
        self._free: deque[tuple[Tensor, int]] = deque()  # slabs with addresses in them, longest free first
        self._last: dict[
            int, tuple[Any, ...]
        ] = {}  # by each slot's address the event of its last copy, if there was one

    @property
    def slots(self) -> int:
        return len(self._last)

    @property
    def slots_in_use(self) -> int:
        return len(self._last) - len(self._free)

    def grow(self, slots: int) -> None:
        """Takes as many slots as lack until there are so many; what the system refuses to pin is ordinary memory."""
        if not self.slots and slots:
            weakref.finalize(self, self._transport.close).atexit = False  # slabs are not freed before copies are done
        for count in slab_slots(slots - self.slots, self._slot_bytes):
            size = count * self._slot_bytes
            slab = None if self.refused else self._transport.pinned_memory(size)
            if slab is None:
                slab = torch.empty(size, dtype=torch.uint8)
                self.refused += slab_bytes(size)
            self.nbytes += slab_bytes(size)
            addresses = [slab.data_ptr() + number * self._slot_bytes for number in range(count)]
            self._last |= dict.fromkeys(addresses, ())
            self._free += [(slab, address) for address in addresses]

    def slot(self) -> tuple[Tensor, tuple[Any, ...]] | None:
        """A slot (sealed_segment_bytes,) in uint8, and the event after which the host may write to it; None if none is
        free.

        The tensor has a storage of its own: when that is freed with the last view of it, the slot is free.
        """
        try:
            slab, address = self._free.popleft()
        except IndexError:
            return None
        memory = (ctypes.c_ubyte * self._segment_bytes).from_address(address)
        weakref.finalize(memory, _give_back, self._free, slab, address).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8), self._last[address]

    def pinned_memory(self, num_bytes: int) -> Tensor | None:
        return self._transport.pinned_memory(num_bytes)

    def host_memory(self, num_bytes: int) -> Tensor:
        return self._transport.host_memory(num_bytes)

    def send(self, copies: Copies, *after: Any) -> Any:
        if not self._last:
            return self._transport.send(copies, *after)
        places = {tensor.untyped_storage().data_ptr() for pair in copies for tensor in pair}
        used = [place for place in places if place in self._last]
        event = self._transport.send(copies, *after, *(event for place in used for event in self._last[place]))
        for place in used:
            self._last[place] = (event,)
        return event

    def mark(self, handed_back: Tensor | None = None) -> Any:
        return self._transport.mark(handed_back)

    def wait(self, event: Any) -> None:
        self._transport.wait(event)

    def finish(self, event: Any) -> None:
        self._transport.finish(event)

    def close(self) -> None:
        self._transport.close()


def _give_back(free: deque[tuple[Tensor, int]], slab: Tensor, address: int) -> None:
    free.append((slab, address))
