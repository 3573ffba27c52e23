"""GGUF headers written byte by byte, so that tests can damage every part of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}


def string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content: Any) -> bytes:
    """A metadata value with its type; `content` of an array is (type of its elements, elements)."""
    return struct.pack("<I", kind) + _bare(kind, content)


def _bare(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        of, elements = content
        return struct.pack("<IQ", of, len(elements)) + b"".join(_bare(of, element) for element in elements)
    return struct.pack(f"<{_CODES[kind]}", content)


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    """An entry of the list of tensors; `shape` is outermost first."""
    dimensions = shape[::-1]
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *dimensions, kind, offset)


@dataclass
class File:
    """A file in parts, each of which a test may replace."""

    keys: list[bytes] = field(default_factory=list)  # name and value
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32

    def content(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts) + b"".join(self.keys + self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, file: Path) -> Path:
        file.write_bytes(self.content())
        return file


def key(name: str, kind: int, content: Any) -> bytes:
    return string(name) + value(kind, content)
