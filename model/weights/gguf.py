"""The tensors of GGUF files as the model's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from model.errors import CheckpointError
from model.gguf.files import GgufModel
from model.gguf.header import TensorInfo, read_header
from model.gguf.names import ROPE_FACTORS, stored_name, weight_name
from model.gguf.vision import vision_weight_name
from model.quantization.gguf_blocks import GgufScheme
from model.quantization.gguf_library import check_installed
from model.quantization.gguf_types import BY_LIBRARY, NATIVE
from model.weights.sources import Group, StoredTensor, WeightSource

_BLOCKS = {kind.name: kind for kind in (*NATIVE, *BY_LIBRARY)}
_LIBRARY = frozenset(kind.name for kind in BY_LIBRARY)


def gguf_tensors(model: GgufModel) -> dict[str, StoredTensor]:
    """A model's tensors by their names in Transformer. Raises CheckpointError for one that has no name there."""
    tensors = {}
    for info in model.tensors.values():
        if info.name == ROPE_FACTORS:
            continue
        name = weight_name(info.name)
        if name is None:
            raise CheckpointError(f"{info.file}: extra tensor {info.name}, which the model does not have")
        tensors[name] = _stored(info)
    return tensors


def gguf_vision_tensors(model: GgufModel) -> dict[str, StoredTensor]:
    """A vision tower's tensors by their names in VisionTower. Raises CheckpointError."""
    tensors = {}
    for info in model.tensors.values():
        name = vision_weight_name(info.name)
        if name is None:
            raise CheckpointError(f"{info.file}: extra tensor {info.name}, which the vision tower does not have")
        tensors[name] = _stored(info)
    return tensors


def stored_in(file: Path) -> list[StoredTensor]:
    """All tensors of one file. Raises CheckpointError."""
    return [_stored(info) for info in read_header(file).tensors.values()]


def check_complete(model: GgufModel, stored: Mapping[str, StoredTensor], expected: Iterable[str]) -> None:
    """Raises CheckpointError, with the name that the file would have for it, if a weight in `expected` is missing."""
    for name in expected:
        for part in _parts(name):
            if part not in stored:
                raise CheckpointError(f"{model.path}: tensor {stored_name(part)} is missing")


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader; matrices and stacks of them, in blocks."""
    tensor = group.tensors.get(".weight")
    if tensor is None or len(group.tensors) > 1 or tensor.dtype not in _BLOCKS:
        return None
    kind, where = _BLOCKS[tensor.dtype], f"{tensor.file}: tensor {tensor.name}"
    if len(tensor.shape) < 2:
        raise CheckpointError(f"{where} is a list of numbers in {kind.name}; only matrices are read in blocks")
    width = tensor.shape[-1]
    if width % kind.block_weights or math.prod(tensor.shape[:-1]) * kind.row_bytes(width) != tensor.num_bytes:
        raise CheckpointError(f"{where}: shape {list(tensor.shape)} in {kind.name} is not {tensor.num_bytes} bytes")
    if kind.name in _LIBRARY:
        check_installed(kind.name)
    return WeightSource(tensor.shape, GgufScheme(kind.name), {"blocks": tensor})


def _stored(info: TensorInfo) -> StoredTensor:
    return StoredTensor(info.file, info.name, info.kind.name, info.shape, info.num_bytes, info.offset)


def _parts(weight: str) -> Iterator[str]:
    """The weights that GGUF files have for one of Transformer's: fused experts are apart."""
    experts, _, fused = weight.rpartition(".experts.")
    if fused == "gate_up_proj":
        yield from (f"{experts}.experts.{kind}_proj.weight" for kind in ("gate", "up"))
    elif fused == "down_proj":
        yield f"{experts}.experts.down_proj.weight"
    else:
        yield weight
