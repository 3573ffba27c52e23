"""The text model's weights, counted before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import TextConfig

if TYPE_CHECKING:
    from model.weights.sources import StoredTensor


@dataclass(frozen=True)
class Weights:
    """The text model's weights as they are stored."""

    parameters: int
    dtype: str
    can_be_mapped: bool

    @classmethod
    def of(cls, tensors: dict[str, StoredTensor], config: TextConfig) -> Weights:
        from model.weights.loading import can_be_mapped, stored_parameters
        from model.weights.shards import stored_dtype

        return cls(stored_parameters(tensors, config), stored_dtype(tensors), can_be_mapped(tensors))
