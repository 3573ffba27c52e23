"""Writes, reads and damages files of units."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cache.disk import DTYPE_NAMES, UnitFile, write_units
from model.weights.read_ahead import as_bytes

Tensors = dict[str, list[tuple[str, Tensor]]]


def tensors(seed: int = 0) -> Tensors:
    """Three units: one of every dtype, one of an empty and a scalar tensor, one of many bytes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, 5, generator=generator) * 50
    return {
        "0.0": [(name.lower(), drawn.to(dtype)) for dtype, name in DTYPE_NAMES.items()],
        "odd": [("none", torch.empty(2, 0, 3)), ("scalar", torch.tensor(3.5)), ("byte", torch.tensor([7]).byte())],
        "1.0": [("keys", torch.randn(1, 2, 700, 10, generator=generator)), ("values", drawn[0])],
    }


def write(path: Path, units: Tensors, metadata: dict[str, str] | None = None, base: int = 0) -> UnitFile:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        digest, size = write_units(descriptor, units, metadata or {}, base)
    finally:
        os.close(descriptor)
    assert path.stat().st_size >= base + size
    return UnitFile(path, header_sha256=digest, base=base)


def content(unit: list[tuple[str, Tensor]]) -> bytes:
    return b"".join(bytes(as_bytes(x.contiguous())) for _, x in unit)


def read(file: UnitFile, name: str) -> bytes:
    into = bytearray(file.units[name].nbytes)
    file.read(name, memoryview(into))
    return bytes(into)


def read_into(file: UnitFile, name: str) -> None:
    file.read(name, memoryview(bytearray(len(content(tensors()[name])))))


def path_of(file: UnitFile) -> Path:
    assert isinstance(file.source, Path)
    return file.source


def again(file: UnitFile) -> UnitFile:
    """The file as another process finds it."""
    return UnitFile(path_of(file), header_sha256=file.header_sha256)
