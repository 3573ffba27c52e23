"""An immutable block of one NoPE layer, and where its segments are: on an accelerator, in host memory, in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from cache.disk import UnitFile
from cache.packing import Packed
from model.kernels.attend import KVSegment


class Place(NamedTuple):
    """Where a block is in memory. Replaced as a whole, so that an interrupt leaves the old place or the new one."""

    segments: list[Packed | None]
    is_on_device: bool = False  # what is in memory: on an accelerator, or else on the host
    arrived: tuple[Any, ...] = ()  # the event of its arrival there, if it may still be on its way


class SealedBlock:
    """Its segments are in memory, in a file, or both. Shared by forks."""

    moved: ClassVar[int] = 0
    """How often any of them has moved."""

    def __init__(
        self, layer: int, segments: Sequence[Packed | None], file: UnitFile | None = None, *, is_on_device: bool = False
    ) -> None:
        self.layer = layer
        self.place = Place(list(segments), is_on_device)
        self.views: dict[int, KVSegment] = {}  # of segments in memory, by number; those of another place are not used
        self.file = file
        self.was_read = False  # all of it, from the file: what is read a second time is worth keeping in memory

    @property
    def segments(self) -> list[Packed | None]:
        return self.place.segments

    @property
    def is_on_device(self) -> bool:
        return self.place.is_on_device

    @property
    def arrived(self) -> tuple[Any, ...]:
        return self.place.arrived

    @property
    def is_in_memory(self) -> bool:
        return any(segment is not None for segment in self.segments)

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes in host memory, or else on an accelerator."""
        return sum(x.nbytes for x in self.segments if x is not None and self.is_on_device != on_host)

    def move(
        self, segments: Sequence[Packed | None], *, is_on_device: bool = False, arrived: tuple[Any, ...] = ()
    ) -> None:
        """Its segments are in another place, or will be there once the event `arrived` has happened."""
        self.place = Place(list(segments), is_on_device, arrived)
        self.views.clear()
        SealedBlock.moved += 1

    def has_arrived(self) -> None:
        """Nothing has to wait for it any more."""
        self.place = self.place._replace(arrived=())

    def drop_from_memory(self) -> None:
        assert self.file is not None, "the only copy"
        self.move([None] * len(self.segments))
