"""How much of mapped weights stays in memory, and how much is read again in every pass over the layers.

Closed forms, for plans and for `model.weights.streaming`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer's weights: those that every token multiplies, and its routed experts."""

    always: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.always + self.experts


@dataclass(frozen=True)
class WeightResidency:
    """How the layers' weights share `budget` bytes of memory.

    Layers are used in a cycle, so a cache that evicts what was used longest ago would always miss. Instead, some bytes
    of every layer stay, and the rest of it, as many bytes in each layer, is streamed. Two layers' streamed parts are in
    memory at a time: the one that is computed, and the next one, or as much of it as fits. The last layer is not in the
    cycle and is streamed as a whole: while a prompt is read, only its keys and values are computed.
    """

    layers: Sequence[LayerBytes]
    budget: int | None = None  # None: no limit

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def is_streamed(self) -> bool:
        return self.budget is not None and self.total > self.budget

    @cached_property
    def streamed_a_layer(self) -> int:
        """The most bytes of a layer in the cycle that do not stay."""
        if self.budget is None or self._needed(0) <= self.budget:
            return 0
        few, enough = 0, max(layer.total for layer in self.layers)
        while enough - few > 1:
            middle = (few + enough) // 2
            if self._needed(middle) <= self.budget:
                enough = middle
            else:
                few = middle
        return enough

    def streamed(self, layer: int) -> int:
        """Bytes of this layer that do not stay. Experts go first, as generating needs few of them."""
        if not self.is_streamed:
            return 0
        total = self.layers[layer].total
        return total if layer == len(self.layers) - 1 else min(total, self.streamed_a_layer)

    @property
    def kept(self) -> int:
        """Bytes that stay in memory."""
        return sum(layer.total - self.streamed(number) for number, layer in enumerate(self.layers))

    @property
    def ahead(self) -> int:
        """The most bytes of the next layer that are read while a layer is computed."""
        if self.budget is None or not self.is_streamed:
            return 0
        return max(0, min(self.streamed_a_layer, self.budget - self.kept - self.streamed_a_layer))

    @property
    def peak(self) -> int:
        """The most bytes in memory at a time: the budget, or a layer if it is smaller."""
        if self.budget is None or not self.is_streamed:
            return self.total
        return max(self.budget, self.kept + self.streamed_a_layer)

    @property
    def read_a_step(self) -> int:
        """Bytes that each prefill step after the first reads from the files."""
        return sum(self.streamed(number) for number in range(len(self.layers) - 1))

    def _needed(self, streamed: int) -> int:
        return sum(max(0, layer.total - streamed) for layer in self.layers[:-1]) + 2 * streamed
