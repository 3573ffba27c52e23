"""Memory-mapped tensors: which bytes of which files they are, reading them in, and giving their memory back.

Only Linux tells where mappings are and reads them in on request; elsewhere no tensor counts as mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

MAPPINGS = "/proc/self/maps"
PIECE_BYTES = 2**26
"""Bytes read between two looks at whether reading is still wanted."""

PAGE_BYTES = mmap.PAGESIZE
WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22
"""Advice to madvise on Linux. POPULATE_READ, which is there since 5.14, returns when the pages are in memory and in the
page table, and takes a fiftieth of the processor time of reading into a buffer (0.08 against 3 to 8 s for 6.4 GB)."""

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ ([1-9]\d*) +(/.*)")


class MappedRange(NamedTuple):
    """Bytes of a file in this process's address space."""

    address: int
    num_bytes: int
    file: str
    inode: int
    offset: int  # in the file

    @property
    def end(self) -> int:
        return self.address + self.num_bytes

    def part(self, start: int, stop: int) -> MappedRange:
        """Bytes start .. stop - 1 of it."""
        return MappedRange(self.address + start, stop - start, self.file, self.inode, self.offset + start)


def mapped_files() -> list[MappedRange]:
    """All files mapped into this process, by address; none on systems other than Linux."""
    try:
        with open(MAPPINGS, encoding="utf-8", errors="surrogateescape") as file:
            lines = [_LINE.fullmatch(line.rstrip("\n")) for line in file]
    except OSError:
        return []
    found = [(int(line[1], 16), int(line[2], 16), line) for line in lines if line is not None]
    return [MappedRange(start, stop - start, line[5], int(line[4]), int(line[3], 16)) for start, stop, line in found]


def ranges_of(tensors: Iterable[Tensor], files: list[MappedRange]) -> list[MappedRange]:
    """The mapped ones among `tensors`, as ascending ranges; neighbours are joined. `files` are all mappings."""
    spans = sorted({_span(tensor) for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()})
    starts, found = [file.address for file in files], list[MappedRange]()
    for start, stop in spans:
        number = bisect_right(starts, start) - 1
        if number < 0 or stop > files[number].end:
            continue
        file = files[number]
        here = file.part(start - file.address, stop - file.address)
        last = found[-1] if found else None
        if last is not None and (last.file, last.inode) == (here.file, here.inode) and start <= last.end:
            found[-1] = last.part(0, max(last.end, stop) - last.address)
        else:
            found.append(here)
    return found


def num_bytes(ranges: Iterable[MappedRange]) -> int:
    return sum(here.num_bytes for here in ranges)


def split(ranges: Iterable[MappedRange], size: int) -> tuple[list[MappedRange], list[MappedRange]]:
    """The first `size` bytes of the ranges, and the rest."""
    first, rest = [], []
    for here in ranges:
        taken = min(here.num_bytes, size)
        size -= taken
        if taken:
            first.append(here.part(0, taken))
        if taken < here.num_bytes:
            rest.append(here.part(taken, here.num_bytes))
    return first, rest


def read_in(ranges: Iterable[MappedRange], is_wanted: Callable[[], bool]) -> None:
    """Reads the ranges into memory, until `is_wanted` says no. Other threads run meanwhile."""
    for here in ranges:
        for start in range(here.address // PAGE_BYTES * PAGE_BYTES, here.end, PIECE_BYTES):
            if not is_wanted():
                return
            size = min(PIECE_BYTES, here.end - start)
            if not _advise(start, size, POPULATE_READ):
                _advise(start, size, WILLNEED)


class Dropper:
    """Gives memory of mapped ranges back to the system. Holds the files open until it is closed."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[str, int], int | None] = {}

    def drop(self, ranges: Iterable[MappedRange]) -> None:
        """Whole pages only: an outer page may belong to a neighbour that stays."""
        for here in ranges:
            start = -(-here.address // PAGE_BYTES) * PAGE_BYTES
            size = here.end // PAGE_BYTES * PAGE_BYTES - start
            if size <= 0:
                continue
            _advise(start, size, DONTNEED)
            descriptor = self._descriptor(here)
            if descriptor is not None:
                with suppress(OSError):
                    os.posix_fadvise(descriptor, here.offset + start - here.address, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            if descriptor is not None:
                os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, here: MappedRange) -> int | None:
        """Of the mapped file; None if it cannot be opened, or another one has its name now."""
        key = here.file, here.inode
        if key not in self._descriptors:
            self._descriptors[key] = None
            with suppress(OSError):
                descriptor = os.open(here.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                if os.fstat(descriptor).st_ino == here.inode:
                    self._descriptors[key] = descriptor
                else:
                    os.close(descriptor)
        return self._descriptors[key]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and behind its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _advise(address: int, num_bytes: int, advice: int) -> bool:
    """Whether the system took it. ctypes calls without Python's lock, which mmap.madvise holds."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    return madvise is not None and madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice) == 0
