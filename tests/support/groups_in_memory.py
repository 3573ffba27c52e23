"""Groups of stored tensors made from tensors in memory, as a reader gets them, and the weights that a source builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.quantization.form import StoredMatrix
from model.weights.sources import Group, StoredTensor, WeightSource

PATH = "model.layers.0.self_attn.q_proj"
FILE = Path("model.safetensors")
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
}


def group(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], settings: Mapping[str, Any], path: str = PATH
) -> Group:
    """`tensors` by what follows the module's name."""
    stored = {
        suffix: StoredTensor(FILE, f"language_model.{path}{suffix}", NAMES[t.dtype], tuple(t.shape), t.nbytes, 0)
        for suffix, t in tensors.items()
    }
    return Group(path, stored, shape, settings)


def built(source: WeightSource, tensors: Mapping[str, Tensor], expert: int | None = None) -> StoredMatrix:
    """The matrix that a source of a group's tensors stands for, or one expert's of a stack."""
    prefix = min((tensor.name for tensor in source.tensors.values()), key=len)
    prefix = prefix[: prefix.index(PATH) + len(PATH)] if PATH in prefix else prefix
    found = {role: tensors[tensor.name.removeprefix(prefix)] for role, tensor in source.tensors.items()}
    shape = source.shape
    if expert is not None:
        found = {role: t[expert] if t.dim() and len(t) == shape[0] else t for role, t in found.items()}
        shape = shape[1:]
    weight = source.scheme.build(found, shape)
    assert isinstance(weight, StoredMatrix)
    return weight


def read_by(
    read: Callable[[Group], WeightSource | None],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    settings: Mapping[str, Any],
    path: str = PATH,
) -> WeightSource:
    source = read(group(tensors, shape, settings, path))
    assert source is not None
    return source
