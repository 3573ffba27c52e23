"""Stored tensors of one module as readers get them, and the weights that their schemes build; reads whole files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.quantization.form import StoredMatrix
from model.weights.shards import read_header
from model.weights.sources import Group, StoredTensor, WeightSource

PATH = "model.layers.0.self_attn.q_proj"
DTYPES = {"U32": torch.uint32, "U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES["F32"] = torch.float32


def group(file: Path, shape: tuple[int, ...], settings: Mapping[str, Any] = {}, path: str = PATH) -> Group:
    """The file's tensors whose names begin with `path`, which may follow `language_model.`."""
    found = {
        name.removeprefix("language_model.").removeprefix(path): tensor
        for name, tensor in read_header(file).items()
        if name.removeprefix("language_model.").startswith(f"{path}.")
    }
    return Group(path, found, shape, settings)


def write(file: Path, tensors: Mapping[str, Tensor], path: str = PATH) -> Path:
    """Tensors by suffix."""
    save_file(
        {f"{path}{suffix}": tensor.contiguous().clone() for suffix, tensor in tensors.items()}, file, {"format": "pt"}
    )
    return file


def tensor(stored: StoredTensor) -> Tensor:
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        data = bytearray(stream.read(stored.num_bytes))
    return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)


def matrices(source: WeightSource | None) -> list[StoredMatrix]:
    """The matrix, or those of a stack: tensors with as many entries as the stack are one for each."""
    assert source is not None
    tensors = {role: tensor(stored) for role, stored in source.tensors.items()}
    if len(source.shape) == 2:
        return [_matrix(source, tensors)]
    count = source.shape[0]
    return [
        _matrix(
            replace(source, shape=source.shape[1:]),
            {role: t[e] if t.dim() and len(t) == count else t for role, t in tensors.items()},
        )
        for e in range(count)
    ]


def _matrix(source: WeightSource, tensors: Mapping[str, Tensor]) -> StoredMatrix:
    built = source.scheme.build(tensors, source.shape)
    assert isinstance(built, StoredMatrix) and built.shape == source.shape
    return built


def relabel(file: Path, name: str, **changes: Any) -> None:
    """Changes a tensor's entry in a file's header, and leaves the data as they are."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
