"""How each of the model's weights is stored: in which tensors of which files, and what these mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from model.quantization.form import Weight


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    file: Path
    name: str  # in the file
    dtype: str  # in the file format's spelling: F32, BF16, F8_E4M3, ... in safetensors, Q4_K ... in GGUF
    shape: tuple[int, ...]
    num_bytes: int
    offset: int  # file offset of its first byte


@dataclass(frozen=True)
class StoredPart(StoredTensor):
    """Parts of a tensor along one axis, in this order; shape and bytes are those of the parts together."""

    whole: StoredTensor
    axis: int  # negative: counted from the last one
    parts: tuple[range, ...]  # in elements of the tensor as it is mapped


class Scheme(Protocol):
    """What the stored tensors of a weight mean; one kind a format, immutable and comparable."""

    @property
    def label(self) -> str:
        """For people, such as "bfloat16", "w4a16 (int4, groups of 128)" or "Q4_K"."""
        ...

    def build(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Weight:
        """The weight of this shape (C_out, C_in) from its tensors by role; they are mapped, so they must not change.

        A Tensor is a weight in a floating-point dtype; anything else is a StoredMatrix.
        """
        ...


@dataclass(frozen=True)
class WeightSource:
    """One of the model's weights, or a stack of them."""

    shape: tuple[int, ...]  # logical; (C_out, C_in) for a matrix, (E, C_out, C_in) for a stack of experts
    scheme: Scheme
    tensors: Mapping[str, StoredTensor]  # by role: what each means is the scheme's affair

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """The stored tensors that belong to one of the model's modules, before it is known what they mean."""

    path: str  # such as model.layers.0.self_attn.q_proj, or model.layers.0.feed_forward.experts.gate_up_proj
    tensors: Mapping[
        str, StoredTensor
    ]  # by what follows the path: .weight, .weight_scale, ...; "" and _scale for fused
    shape: tuple[
        int, ...
    ]  # that the model expects: (C_out, C_in); fused experts (E, C_in, C_out); stacked (E, C_out, C_in)
    settings: Mapping[str, Any]  # config.json's quantization_config, or what an older tool wrote instead; may be empty


class Reader(Protocol):
    """One for each format: recognises its tensors by their dtypes and companions first, by the configuration second."""

    def __call__(self, group: Group) -> WeightSource | None:
        """None if the tensors are in another format. Raises CheckpointError, naming the tensor, for damaged ones."""
        ...
