"""The directories of a TIFF file, followed without decoding: how many pages there are."""

from __future__ import annotations

import struct
from dataclasses import dataclass

SHORT, LONG = 3, 4
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 0x0112, 0x0142, 0x0143

TIFF_PREFIXES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two: BigTIFF, with 64-bit offsets
TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}


@dataclass(frozen=True)
class TiffDirectory:
    """A directory of tags in TIFF or EXIF data that has room for the entries that it declares."""

    raw: bytes
    order: str
    is_big: bool
    offset: int

    @classmethod
    def first(cls, raw: bytes) -> TiffDirectory | None:
        if not raw.startswith(TIFF_PREFIXES) or len(raw) < 16:
            return None
        order, is_big = "<" if raw.startswith(b"II") else ">", b"+" in raw[2:4]
        (offset,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", raw, 8 if is_big else 4)
        return cls._at(raw, order, is_big, offset)

    @classmethod
    def _at(cls, raw: bytes, order: str, is_big: bool, offset: int) -> TiffDirectory | None:
        found = cls(raw, order, is_big, offset)
        fits = 0 < offset <= len(raw) - 8 and found._end() <= len(raw)
        return found if fits else None

    def _begin(self) -> int:
        return self.offset + (8 if self.is_big else 2)

    def _end(self) -> int:
        (count,) = struct.unpack_from(f"{self.order}{'Q' if self.is_big else 'H'}", self.raw, self.offset)
        return int(self._begin() + count * (20 if self.is_big else 12))

    def following(self) -> TiffDirectory | None:
        """The next directory of the chain."""
        end, (form, size) = self._end(), (("Q", 8) if self.is_big else ("I", 4))
        if end + size > len(self.raw):
            return None
        (offset,) = struct.unpack_from(f"{self.order}{form}", self.raw, end)
        return self._at(self.raw, self.order, self.is_big, offset)

    def numbers(self) -> tuple[dict[int, int], int]:
        """Single whole numbers by tag, and how many bytes all tags claim outside of the directory."""
        form, inline = ("HHQQ", 8) if self.is_big else ("HHII", 4)
        found: dict[int, int] = {}
        claimed = 0
        for tag, kind, count, value in struct.iter_unpack(self.order + form, self.raw[self._begin() : self._end()]):
            size = TYPE_BYTES.get(kind, 0) * count
            if size > inline:
                claimed += size
            elif count == 1 and kind in (SHORT, LONG):  # left-aligned in the field
                found.setdefault(tag, value >> 8 * (inline - size) if self.order == ">" else value % (1 << 8 * size))
        return found, claimed
