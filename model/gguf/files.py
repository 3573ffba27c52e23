"""A model in one GGUF file, or in parts named …-00001-of-0000N.gguf with headers of their own. Imports no torch."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from model.errors import CheckpointError
from model.gguf.header import GgufHeader, TensorInfo, Value, is_gguf, read_header

SUFFIX = ".gguf"
VISION_PREFIX = "mmproj"
"""How files that hold a vision tower are named."""

MOST_PARTS = 1000
MOST_NAMES = 5000
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufModel:
    """What the headers of a model's files say."""

    path: Path  # of its first part
    metadata: Mapping[str, Value]  # of the first part
    tensors: Mapping[str, TensorInfo]  # of all parts
    parts: tuple[Path, ...]


def find_gguf(path: Path) -> Path | None:
    """The GGUF model that `path` names: the file itself, its first part, or the only model in a folder; or None.

    A folder with other weights, or with several models, is none. Only looks at names and first bytes.
    """
    if os.path.isdir(path):
        models = models_in(path)
        return models[0] if len(models) == 1 and not any(map(is_of_safetensors, names_in(path))) else None
    return first_part(path) if is_gguf(path) else None


def models_in(folder: Path) -> list[Path]:
    """The GGUF models in a folder, each by its first part; vision towers do not count."""
    names = (name for name in names_in(folder) if name.endswith(SUFFIX) and not name.startswith(VISION_PREFIX))
    return sorted({first_part(folder / name) for name in names})


def names_in(folder: Path) -> list[str]:
    """At most MOST_NAMES names, sorted; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, MOST_NAMES))
    except OSError:
        return []


def is_of_safetensors(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def first_part(file: Path) -> Path:
    part = _PART.fullmatch(file.name)
    return file if part is None else file.with_name(f"{part[1]}-00001-of-{part[3]}{SUFFIX}")


def read_gguf(file: Path) -> GgufModel:
    """Reads the headers of the model whose first part is `file`. Raises CheckpointError."""
    try:
        key = tuple((part.st_mtime_ns, part.st_size) for part in (os.stat(path) for path in _names_of_parts(file)))
    except OSError:
        key = ()  # what is missing is said below
    return _read(file, key)


@functools.lru_cache(maxsize=4)
def _read(file: Path, state: tuple[tuple[int, int], ...]) -> GgufModel:
    """`state`: of the files, so that changed ones are read again."""
    names = _names_of_parts(file)
    for number, part in enumerate(names, 1):
        if not part.is_file():
            raise CheckpointError(f"{part}: missing: part {number} of {len(names)}; download it again")
    headers = [read_header(part) for part in names]
    for number, header in enumerate(headers):
        _check_part(header, number, len(headers))
    tensors: dict[str, TensorInfo] = {}
    for tensor in _all(headers):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} appears twice (also in {tensors[tensor.name].file.name})"
            )
        tensors[tensor.name] = tensor
    expected = headers[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{file}: split.tensors.count is {expected}, but its parts hold {len(tensors):,} tensors; download it again"
        )
    return GgufModel(file, headers[0].metadata, tensors, tuple(names))


def _all(headers: Iterable[GgufHeader]) -> Iterable[TensorInfo]:
    return (tensor for header in headers for tensor in header.tensors.values())


def _names_of_parts(file: Path) -> list[Path]:
    part = _PART.fullmatch(file.name)
    if part is None:
        return [file]
    count = int(part[3])
    if not 1 <= count <= MOST_PARTS:
        raise CheckpointError(f"{file}: {count} parts are not 1 to {MOST_PARTS}")
    return [file.with_name(f"{part[1]}-{number:05}-of-{part[3]}{SUFFIX}") for number in range(1, count + 1)]


def _check_part(header: GgufHeader, number: int, count: int) -> None:
    """Checks what a part's metadata says of its place, `number` from 0, among `count`."""
    said = header.metadata.get("split.count", 1) or 1  # merged files say 0
    if said != count and count == 1:
        raise CheckpointError(
            f"{header.file}: one of {said} parts (split.count), but not named as one: its name must end in "
            f"-00001-of-0000N{SUFFIX}, as it was published"
        )
    for key, found, wanted in (("split.count", said, count), ("split.no", header.metadata.get("split.no", 0), number)):
        if found != wanted:
            raise CheckpointError(f"{header.file}: {key} is {found}, but by its name it is {wanted}")
