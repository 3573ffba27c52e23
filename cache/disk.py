"""Tensors in files: written once, read by positioned reads into reused buffers, verified on the first read.

Files are in safetensors format. Their tensors are grouped into units, the tensors of one read: consecutive bytes with
one CRC-32, kept in the header's metadata together with the unit's offset and length. Files are never mapped: a process
that touches a mapped file which was truncated is killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.errors import DiskError, DiskFullError, UnreadableError
from model.weights.read_ahead import as_bytes, read_exactly

MAX_HEADER_BYTES = 16 * 2**20
LONGEST_NAME = 64  # of a unit, which is in messages
ALIGNMENT = 64
PIECE_BYTES = 16 * 2**20
"""Read at a time where a whole file is verified."""

PART_BYTES = 2**20
"""Read at a time where a unit is verified of which only parts are wanted."""

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint8: "U8",
}
PASSING = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EBUSY,
        errno.EAGAIN,
        errno.EINTR,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
    }
)
"""Errors that say nothing about the file's content: permissions, limits, a device or a network that may recover."""

Units = Mapping[str, Sequence[tuple[str, Tensor]]]
"""The named tensors of each unit, in file order."""


@dataclass(frozen=True)
class Unit:
    """Where a unit lies: its offset from the end of the header and its length, in bytes, and its CRC-32."""

    offset: int
    nbytes: int
    crc32: int


def write_units(descriptor: int, units: Units, metadata: Mapping[str, str], base: int = 0) -> tuple[str, int]:
    """Writes a safetensors file at `base` of an open file; returns the header's SHA-256 (hex) and the bytes written.

    Raises OSError. Nothing is read back: a torn write shows in the header's digest or in a unit's CRC-32.
    """
    header: dict[str, Any] = {}
    places: dict[str, list[int]] = {}
    payload: list[memoryview] = []
    offset = 0
    for unit, tensors in units.items():
        begin, crc = offset, 0
        for name, tensor in tensors:
            assert tensor.is_contiguous(), (
                unit,
                name,
                tensor.stride(),
            )  # a contiguous copy would be freed before it is written
            content = as_bytes(tensor)
            header[f"{unit}.{name}"] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + len(content)],
            }
            payload.append(content)
            crc = zlib.crc32(content, crc)
            offset += len(content)
        places[unit] = [begin, offset - begin, crc]
    header["__metadata__"] = {**metadata, "units": json.dumps(places, separators=(",", ":"))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    position = base
    for content in [memoryview(head), *payload]:
        while content:
            written = os.pwrite(descriptor, content, position)
            position, content = position + written, content[written:]
    return hashlib.sha256(head).hexdigest(), position - base


class UnitFile:
    """A file of units, by path or, for a scratch file, by an open descriptor and the place in it.

    With `header_sha256` the header must be the one that was written. Safe to use from several threads at once.
    """

    def __init__(self, source: Path | int, *, header_sha256: str | None, base: int = 0) -> None:
        self.source = source
        self.header_sha256, self._base = header_sha256, base
        self._units: dict[str, Unit] | None = None
        self._metadata: dict[str, str] = {}
        self._data = 0  # where the first unit begins
        self._size = 0  # of the file when its header was read
        self._verified: set[str] = set()

    @property
    def units(self) -> dict[str, Unit]:
        """Raises DiskError when the header is missing, damaged or not the expected one."""
        if self._units is None:
            with self._opened() as descriptor:
                self._read_header(descriptor)
        assert self._units is not None
        return self._units

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that `write_units` was given. Raises DiskError."""
        assert self.units is not None
        return self._metadata

    def num_bytes(self, name: str, most: int) -> int:
        """How long a unit is, for whoever makes a buffer for it: no longer than the file, and at most `most`.

        Raises DiskError.
        """
        unit = self.units.get(name)
        if unit is None:
            raise DiskError(f"{self.source}: {name} is missing")
        left = max(0, self._size - self._data - unit.offset)
        if isinstance(self.source, Path) and left < unit.nbytes:
            raise self._cut_short(name, left, unit.nbytes)
        if unit.nbytes > most:
            raise DiskError(f"{self.source}: {name} has {unit.nbytes:,} bytes, more than {most:,}")
        return unit.nbytes

    def read(self, name: str, into: memoryview) -> None:
        """Fills `into`, which is as long as the unit, and verifies the checksum the first time. Raises DiskError."""
        with self._opened() as descriptor:
            unit = self._unit(descriptor, name, len(into))
            self._read_whole(descriptor, name, into, unit.offset)
        if name not in self._verified:
            self._check_sum(name, unit, zlib.crc32(into))

    def read_parts(self, name: str, nbytes: int, parts: Sequence[range], into: memoryview) -> None:
        """Fills `into` with these parts of a unit of `nbytes`, one behind the other.

        The first time all of the unit is read, to verify its checksum. Raises DiskError.
        """
        with self._opened() as descriptor:
            unit = self._unit(descriptor, name, nbytes)
            if name not in self._verified:
                self._verify_unit(descriptor, name, unit, memoryview(bytearray(min(PART_BYTES, nbytes))))
            done = 0
            for part in parts:
                self._read_whole(descriptor, name, into[done : done + len(part)], unit.offset + part.start)
                done += len(part)
        assert done == len(into), (done, len(into))

    def _unit(self, descriptor: int, name: str, nbytes: int) -> Unit:
        if self._units is None:
            self._read_header(descriptor)
        assert self._units is not None
        unit = self._units.get(name)
        if unit is None or unit.nbytes != nbytes:
            found = "missing" if unit is None else f"{unit.nbytes:,} bytes long"
            raise DiskError(f"{self.source}: {name} is {found} instead of {nbytes:,} bytes")
        return unit

    def _read_whole(self, descriptor: int, name: str, into: memoryview, offset: int) -> None:
        done = self._read_into(descriptor, into, offset)
        if done < len(into):
            raise self._cut_short(name, done, len(into))

    def _verify_unit(self, descriptor: int, name: str, unit: Unit, buffer: memoryview) -> None:
        """Reads all of a unit, as much at a time as the buffer holds."""
        crc = 0
        for start in range(0, unit.nbytes, max(1, len(buffer))):
            piece = buffer[: min(len(buffer), unit.nbytes - start)]
            done = self._read_into(descriptor, piece, unit.offset + start)
            if done < len(piece):
                raise self._cut_short(name, start + done, unit.nbytes)
            crc = zlib.crc32(piece, crc)
        self._check_sum(name, unit, crc)

    def _read_into(self, descriptor: int, into: memoryview, offset: int) -> int:
        """Bytes read from `offset` behind the header, fewer only at the file's end. Raises DiskError."""
        try:
            return read_exactly(descriptor, into, self._data + offset)
        except OverflowError as error:  # an offset past what a file can have
            raise DiskError(f"{self.source}: cannot be read: {error}") from None
        except OSError as error:
            raise _unread(f"{self.source}: cannot be read: {error.strerror}", error) from None

    def _cut_short(self, name: str, done: int, nbytes: int) -> DiskError:
        return DiskError(f"{self.source}: cut short: {name} ends after {done:,} of {nbytes:,} bytes")

    def _check_sum(self, name: str, unit: Unit, crc32: int) -> None:
        if crc32 != unit.crc32:
            raise DiskError(f"{self.source}: damaged: the checksum of {name} does not match")
        self._verified.add(name)

    def check_size(self) -> None:
        """Checks the header and the length of the file without reading a unit. Raises DiskError."""
        units = self.units.values()
        with self._opened() as descriptor:
            try:
                size = os.fstat(descriptor).st_size
            except OSError as error:
                raise _unread(f"{self.source}: cannot be read: {error.strerror}", error) from None
        expected = self._data + max((unit.offset + unit.nbytes for unit in units), default=0)
        if isinstance(self.source, Path) and size != expected:
            raise DiskError(
                f"{self.source}: {'cut short' if size < expected else 'too long'}: "
                f"{size:,} bytes instead of {expected:,}"
            )

    def verify(self) -> int:
        """Reads and verifies every unit; returns the number of bytes. Raises DiskError at the first damage."""
        self.check_size()
        buffer = memoryview(bytearray(min(PIECE_BYTES, max((unit.nbytes for unit in self.units.values()), default=0))))
        with self._opened() as descriptor:
            for name, unit in self.units.items():
                self._verify_unit(descriptor, name, unit, buffer)
        return sum(unit.nbytes for unit in self.units.values())

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if isinstance(self.source, int):
            yield self.source
            return
        try:
            descriptor = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            what = "missing" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error.strerror}"
            raise _unread(f"{self.source}: {what}", error) from None
        try:
            yield descriptor
        finally:
            with suppress(OSError):  # nothing was written
                os.close(descriptor)

    def _read_header(self, descriptor: int) -> None:
        length = bytearray(8)
        try:
            done = read_exactly(descriptor, memoryview(length), self._base)
            size = int.from_bytes(length, "little")
            if done < 8 or size > MAX_HEADER_BYTES:
                raise DiskError(f"{self.source}: damaged: it does not begin with a header")
            text = bytearray(size)
            done = read_exactly(descriptor, memoryview(text), self._base + 8)
            self._size = os.fstat(descriptor).st_size
        except OSError as error:
            raise _unread(f"{self.source}: cannot be read: {error.strerror}", error) from None
        digest = hashlib.sha256(length + text).hexdigest()
        if done < size or (self.header_sha256 is not None and digest != self.header_sha256):
            raise DiskError(f"{self.source}: damaged, or another file: its header is not the one that was written")
        try:
            metadata = dict(json.loads(text)["__metadata__"])
            places = json.loads(metadata.pop("units"))
            units = {str(name): Unit(*(int(number) for number in place)) for name, place in places.items()}
            if any(unit.offset < 0 or unit.nbytes < 0 for unit in units.values()):
                raise ValueError("a negative length")
            if any(len(name) > LONGEST_NAME for name in units):
                raise ValueError(f"a name of more than {LONGEST_NAME} characters")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise DiskError(f"{self.source}: not a file that l4ctx wrote ({type(error).__name__}: {error})") from None
        self._data = self._base + 8 + size
        self._metadata, self._units = metadata, units


def _unread(message: str, error: OSError) -> DiskError:
    return (UnreadableError if error.errno in PASSING else DiskError)(message)


class Scratch:
    """Rows of blocks in an unnamed file in `folder`, which is gone when the process ends, however it ends."""

    is_durable = False  # rows are written when memory is needed, not when they are sealed

    def __init__(self, folder: Path) -> None:
        """Raises DiskFullError when no file can be created there."""
        self.folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="l4ctx-")  # noqa: SIM115 (lives as long as the run)
        except OSError as error:
            raise DiskFullError(f"{folder}: cannot create a file there: {error.strerror}") from None
        self._end = 0

    def close(self) -> None:
        """Frees the space at once; nothing that was written can be read afterwards."""
        self._file.close()

    def write(self, row: int, units: Units) -> UnitFile:
        """Raises DiskFullError."""
        try:
            digest, size = write_units(self._file.fileno(), units, {"block": str(row)}, self._end)
        except OSError as error:
            raise DiskFullError(
                f"{self.folder}: keys and values cannot be written: {error.strerror}; "
                "free some space there, or name another folder with --kv-dir"
            ) from None
        file = UnitFile(self._file.fileno(), header_sha256=digest, base=self._end)
        self._end += -(-size // 4096) * 4096
        return file
