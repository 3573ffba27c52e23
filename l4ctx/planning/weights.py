"""A model's weights as they are stored: bytes by owner, stored type and layer. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cache.layout import KV_DTYPES
from model.config import TextConfig
from model.weights.owners import Owner, owner_of
from model.weights.residency import LayerBytes

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class WeightBytes:
    """Weights of one owner, layer and stored type."""

    owner: Owner
    layer: int | None  # None: outside of the layers
    stored_type: str
    num_bytes: int
    parameters: int

    @classmethod
    def of(cls, name: str, stored_type: str, num_bytes: int, parameters: int) -> WeightBytes:
        """`name`: in Transformer."""
        layer = _LAYER.match(name)
        return cls(owner_of(name), int(layer[1]) if layer else None, stored_type, num_bytes, parameters)

    @property
    def is_converted(self) -> bool:
        """To the dtype computed in, when it is loaded."""
        return self.owner is Owner.SMALL


@dataclass(frozen=True)
class StoredWeights:
    """The weights of the text model."""

    parts: Sequence[WeightBytes]
    num_layers: int

    @classmethod
    def of(cls, config: TextConfig, parts: Iterable[WeightBytes]) -> StoredWeights:
        return cls(tuple(parts), config.num_hidden_layers)

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @cached_property
    def layers(self) -> tuple[LayerBytes, ...]:
        """Bytes of each layer that keep their stored form."""
        always, experts = [0] * self.num_layers, [0] * self.num_layers
        for part in self.parts:
            if part.layer is not None and not part.is_converted:
                (experts if part.owner is Owner.ROUTED else always)[part.layer] += part.num_bytes
        return tuple(LayerBytes(*both) for both in zip(always, experts, strict=True))

    def converted(self, dtype: str) -> int:
        """Bytes of those that are converted to `dtype`, not being stored in it."""
        converted = (part for part in self.parts if part.is_converted and part.stored_type != dtype)
        return sum(part.parameters for part in converted) * KV_DTYPES[dtype]

    def owned_by(self, owner: Owner) -> int:
        """Bytes."""
        return sum(part.num_bytes for part in self.parts if part.owner is owner)

    def by_owner(self) -> dict[Owner, dict[str, int]]:
        """Bytes by owner and stored type, owners in their order, and the larger types first."""
        found: dict[Owner, dict[str, int]] = {}
        for owner in Owner:
            types: dict[str, int] = {}
            for part in self.parts:
                if part.owner is owner:
                    types[part.stored_type] = types.get(part.stored_type, 0) + part.num_bytes
            if types:
                found[owner] = dict(sorted(types.items(), key=lambda entry: -entry[1]))
        return found
