"""A model's weights as they are stored: bytes by owner, stored form and layer. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cache.layout import KV_DTYPES
from model.config import TextConfig
from model.weights.owners import Owner, Share, owner_of, shares
from model.weights.residency import LayerBytes

PLAIN = frozenset({"float32", "bfloat16", "float16"})
"""Stored forms that are floating-point dtypes."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class WeightBytes(Share):
    """Weights of one owner, layer and stored form."""

    layer: int | None  # None: outside of the layers

    @classmethod
    def of(cls, name: str, stored: str, parameters: int, num_bytes: int) -> WeightBytes:
        """`name`: in Transformer."""
        layer = _LAYER.match(name)
        return cls(owner_of(name), stored, parameters, num_bytes, int(layer[1]) if layer else None)

    def changes(self, dtype: str) -> bool:
        """Whether a model that computes in `dtype` holds them converted: norms, biases and routers, and float32."""
        return self.stored != dtype and (self.owner is Owner.SMALL or self.stored == "float32")

    def bytes_in(self, dtype: str) -> int:
        """As a model that computes in `dtype` holds them."""
        return self.parameters * KV_DTYPES[dtype] if self.changes(dtype) else self.num_bytes


@dataclass(frozen=True)
class StoredWeights:
    """The weights of the text model."""

    parts: Sequence[WeightBytes]
    num_layers: int
    is_made: bool = False  # some are quantized while they are loaded: none stays in its file

    @classmethod
    def of(cls, config: TextConfig, parts: Iterable[WeightBytes], *, is_made: bool = False) -> StoredWeights:
        return cls(tuple(parts), config.num_hidden_layers, is_made)

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @cached_property
    def layers(self) -> tuple[LayerBytes, ...]:
        """Bytes of each layer that keep their stored form."""
        return self._layers(lambda part: part.num_bytes)

    def layers_in(self, dtype: str) -> tuple[LayerBytes, ...]:
        """Bytes of each layer without norms, biases and routers, as a model that computes in `dtype` holds them."""
        if dtype not in self._layers_by_dtype:
            self._layers_by_dtype[dtype] = self._layers(lambda part: part.bytes_in(dtype))
        return self._layers_by_dtype[dtype]

    def converted(self, dtype: str) -> int:
        """Bytes of those that are converted to `dtype`."""
        return sum(part.bytes_in(dtype) for part in self.parts if part.changes(dtype))

    def bytes_in(self, dtype: str) -> int:
        """As a model that computes in `dtype` holds them."""
        return sum(part.bytes_in(dtype) for part in self.parts)

    def expanded_in(self, dtype: str) -> int:
        """Bytes of those that products in `dtype` must expand first, unless vector code reads them as they are."""
        return sum(part.num_bytes for part in self.parts if part.stored != dtype and not part.changes(dtype))

    @property
    def is_plain(self) -> bool:
        """Whether all are stored in a floating-point dtype, so that --quantize applies to them."""
        return not self.is_made and all(part.stored in PLAIN for part in self.parts)

    def owned_by(self, owner: Owner) -> int:
        """Bytes."""
        return sum(part.num_bytes for part in self.parts if part.owner is owner)

    def by_owner(self) -> tuple[Share, ...]:
        """Sums by owner and stored form."""
        return shares(self.parts)

    @cached_property
    def _layers_by_dtype(self) -> dict[str, tuple[LayerBytes, ...]]:
        return {}

    def _layers(self, size: Callable[[WeightBytes], int]) -> tuple[LayerBytes, ...]:
        always, experts = [0] * self.num_layers, [0] * self.num_layers
        for part in self.parts:
            if part.layer is not None and part.owner is not Owner.SMALL:
                (experts if part.owner is Owner.ROUTED else always)[part.layer] += size(part)
        return tuple(LayerBytes(*both) for both in zip(always, experts, strict=True))
