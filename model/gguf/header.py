"""The header of one GGUF file: metadata and the list of tensors, checked against the file's size. Imports no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Headers are
untrusted: every count and length is compared with the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.errors import CheckpointError
from model.folder import open_regular
from model.quantization.gguf_types import BY_NUMBER, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONGEST_NAME = 1024  # of keys and tensors; llama.cpp's own have up to 64 bytes
MAX_HEADER_BYTES = 2**26  # Llama 4's has 16 MB
MOST_KEYS, MOST_TENSORS = 2**16, 2**16  # each takes memory, as an object in Python: Llama 4 has 50 and 1,000
MOST_VALUES = 2**20  # in an array, of which the longest of Llama 4 has 440,000
MOST_NUMBERS = 2**22  # in all arrays of numbers, at 40 bytes each

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _U64, _START = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<4sIQQ")


class Strings:
    """An array of strings, decoded when it is used: vocabularies hold hundreds of thousands."""

    def __init__(self, data: bytes, count: int) -> None:
        """`data`: for each string, its length in 8 bytes, and its UTF-8."""
        self._data = data
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        """Bytes that are not UTF-8 become U+FFFD."""
        data, at = self._data, 0
        for _ in range(self._count):
            start = at + 8
            at = start + _U64.unpack_from(data, at)[0]
            yield data[start:at].decode("utf-8", "replace")


Value = bool | int | float | str | tuple[bool | int | float, ...] | Strings


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it."""

    file: Path
    name: str
    kind: BlockType
    shape: tuple[int, ...]  # outermost first, as in torch; the file lists the innermost first
    num_bytes: int
    offset: int  # in the file


@dataclass(frozen=True)
class GgufHeader:
    """What a file's header says."""

    file: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]  # in the file's order


def is_gguf(path: Path) -> bool:
    """Whether it is a regular file that begins like a GGUF file."""
    try:
        with open_regular(path) as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(file: Path) -> GgufHeader:
    """Reads and checks a file's header. Raises CheckpointError, naming the key or the tensor that is wrong."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < _START.size:
                raise CheckpointError(f"{file}: no GGUF file, or cut short inside its header ({size} bytes)")
            with mmap.mmap(stream.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data:
                return _Parser(file, data, size).header()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None


class _Parser:
    """Reads a header from front to back; `at` is the position in the file."""

    def __init__(self, file: Path, data: mmap.mmap, size: int) -> None:
        self.file = file
        self.data = data
        self.size = size
        self.stop = len(data)
        self.at = 0
        self.numbers = 0  # in arrays, so far

    def header(self) -> GgufHeader:
        magic, version, tensor_count, key_count = _START.unpack_from(self.data)
        if self.data[:8] == b"version ":  # git without LFS leaves this
            raise self.error("a Git LFS pointer, not the file itself: run git lfs pull, or download it")
        if magic != MAGIC:
            raise self.error("not a GGUF file")
        if version not in VERSIONS:
            is_swapped = version & 0xFFFF == 0
            what = "a big-endian file" if is_swapped else f"version {version} of the format"
            raise self.error(f"{what} is not read; only versions 2 and 3, little-endian, are: convert it again")
        self.at = _START.size
        self.expect_objects(key_count, 8 + 4 + 1, MOST_KEYS, "keys")
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self.name("a metadata key")
            if key in metadata:
                raise self.error(f"metadata key {key} appears twice")
            metadata[key] = self.value(key)
        self.expect_objects(tensor_count, 8 + 4 + 4 + 8, MOST_TENSORS, "tensors")
        found: dict[str, TensorInfo] = {}
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.name in found:
                raise self.error(f"tensor {tensor.name} appears twice")
            found[tensor.name] = tensor
        return GgufHeader(self.file, version, metadata, self.placed(found, self.alignment(metadata)))

    def placed(self, tensors: Mapping[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors with offsets in the file, which must be aligned, apart from one another, and within the file."""
        start = -(-self.at // alignment) * alignment
        for name, tensor in tensors.items():
            if tensor.offset % alignment:
                raise self.error(f"tensor {name}: its offset {tensor.offset} is no multiple of {alignment}")
        placed = {}
        for name, tensor in tensors.items():
            offset = start + tensor.offset
            if offset + tensor.num_bytes > self.size:
                raise self.error(
                    f"truncated: tensor {name} ends at byte {offset + tensor.num_bytes:,}, but the file has "
                    f"{self.size:,}; download it again"
                )
            placed[name] = TensorInfo(self.file, name, tensor.kind, tensor.shape, tensor.num_bytes, offset)
        end, before = 0, ""
        for tensor in sorted(placed.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.error(f"tensors {before} and {tensor.name} overlap")
            end, before = tensor.offset + tensor.num_bytes, tensor.name
        return placed

    def alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or value <= 0 or value & (value - 1):
            raise self.error(f"general.alignment: {value!r} is not a power of two")
        return value

    def tensor(self) -> TensorInfo:
        """The next entry of the list; its offset is still relative to the data's start."""
        name = self.name("a tensor's name")
        what = f"tensor {name}"
        dimensions = self.u32(what)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.error(f"{what}: {dimensions} dimensions are not 1 to {MOST_DIMENSIONS}")
        shape = tuple(self.u64(what) for _ in range(dimensions))[::-1]
        number = self.u32(what)
        offset = self.u64(what)
        kind = BY_NUMBER.get(number)
        if kind is None:
            raise self.error(f"{what}: its type, number {number}, is not read")
        if min(shape) < 1:
            raise self.error(f"{what}: its shape {list(shape)} has a size of 0")
        if shape[-1] % kind.block_weights:
            raise self.error(
                f"{what}: rows of {shape[-1]:,} weights are no whole number of {kind.name} blocks of "
                f"{kind.block_weights}"
            )
        return TensorInfo(self.file, name, kind, shape, math.prod(shape[:-1]) * kind.row_bytes(shape[-1]), offset)

    def value(self, key: str) -> Value:
        kind = self.u32(key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        return self.scalars(key, kind, 1)[0]

    def array(self, key: str) -> Value:
        kind, count = self.u32(key), self.u64(key)
        if kind == _ARRAY:
            raise self.error(f"metadata key {key}: arrays of arrays are not read")
        if count > MOST_VALUES:
            raise self.error(f"metadata key {key}: {count:,} values are more than {MOST_VALUES:,}")
        if kind != _STRING:
            return self.scalars(key, kind, count)
        self.expect(count * 8, key)
        data, start, at, last, unpack = self.data, self.at, self.at, self.stop - 8, _U64.unpack_from
        for _ in range(count):
            if at > last:
                raise self.cut_short(key)
            at += 8 + unpack(data, at)[0]
        self.expect(at - start, key)
        self.at = at
        return Strings(data[start:at], count)

    def scalars(self, key: str, kind: int, count: int) -> tuple[bool | int | float, ...]:
        code = _SCALARS.get(kind)
        if code is None:
            raise self.error(f"metadata key {key}: its type, number {kind}, is unknown")
        self.numbers += count
        if self.numbers > MOST_NUMBERS:
            raise self.error(f"metadata key {key}: more than {MOST_NUMBERS:,} numbers up to here")
        num_bytes = count * struct.calcsize(f"<{code}")
        self.expect(num_bytes, key)
        values: tuple[bool | int | float, ...] = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += num_bytes
        return values

    def name(self, what: str) -> str:
        length = self.u64(what)
        if not 0 < length <= LONGEST_NAME:
            raise self.error(f"{what} at byte {self.at:,} has {length:,} bytes, not 1 to {LONGEST_NAME:,}")
        text = self.text(length, what)
        if not text.isprintable():
            raise self.error(f"{what} at byte {self.at - length:,} is not a name: {text[:40]!r}")
        return text

    def string(self, key: str) -> str:
        return self.text(self.u64(key), key)

    def text(self, length: int, what: str) -> str:
        self.expect(length, what)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def u32(self, what: str) -> int:
        self.expect(4, what)
        self.at += 4
        return int(_U32.unpack_from(self.data, self.at - 4)[0])

    def u64(self, what: str) -> int:
        self.expect(8, what)
        self.at += 8
        return int(_U64.unpack_from(self.data, self.at - 8)[0])

    def expect_objects(self, count: int, least_bytes: int, most: int, what: str) -> None:
        self.expect(count * least_bytes, f"{count:,} {what}")
        if count > most:
            raise self.error(f"{count:,} {what} are more than {most:,}")

    def expect(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.stop - self.at:
            raise self.cut_short(what)

    def cut_short(self, what: str) -> CheckpointError:
        return self.error(
            f"its header is damaged or cut short at byte {self.at:,}, in {what} (the file has {self.size:,} bytes); "
            "download it again"
        )

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {what}")
