"""Weights in a floating-point dtype, as published: no companions, nothing to decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.quantization.form import Weight
from model.weights.sources import Group, WeightSource

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class PlainScheme:
    """The numbers themselves."""

    dtype: str  # in torch's spelling

    @property
    def label(self) -> str:
        return self.dtype

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        return tensors["weight"]


def read(group: Group) -> WeightSource | None:
    """See model.weights.sources.Reader. The shape is checked by the caller, which knows other names for it."""
    if len(group.tensors) != 1:
        return None
    suffix, tensor = next(iter(group.tensors.items()))
    if suffix not in ("", ".weight") or tensor.dtype not in DTYPE_NAMES:
        return None
    return WeightSource(tensor.shape, PlainScheme(DTYPE_NAMES[tensor.dtype]), {"weight": tensor})
