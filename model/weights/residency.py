"""How much of the weights stays in memory or on a device, and how much comes again in every pass over the layers.

Closed forms, for plans, `model.weights.streaming` and `model.weights.device_stream`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class _Residency:
    """The layers' weights, and how many of their bytes may stay at a time."""

    layers: Sequence[LayerBytes]
    budget: int | None = None  # None: no limit

    @cached_property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def is_streamed(self) -> bool:
        return self.budget is not None and self.total > self.budget


@dataclass(frozen=True)
class WeightResidency(_Residency):
    """How the layers' weights share `budget` bytes of memory.

    Layers are used in a cycle, so a cache that evicts what was used longest ago would always miss. Instead, some bytes
    of every layer stay, and the rest of it, as many bytes in each layer, is streamed. Two layers' streamed parts are in
    memory at a time: the one that is computed, and the next one, or as much of it as fits. The last layer is not in the
    cycle and is streamed as a whole: while a prompt is read, only its keys and values are computed.
    """

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

    @cached_property
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

    @cached_property
    def read_a_step(self) -> int:
        """Bytes that each prefill step after the first reads from the files."""
        return sum(self.streamed(number) for number in range(len(self.layers) - 1))

    def _needed(self, streamed: int) -> int:
        return sum(max(0, layer.total - streamed) for layer in self.layers[:-1]) + 2 * streamed


@dataclass(frozen=True)
class DeviceResidency(_Residency):
    """Which weights stay on a device that gives the layers `budget` bytes, buffers included.

    A unit is a layer's routed experts, or all else of it. Units stay or are copied as a whole: what every token
    multiplies stays first, layer by layer, then experts. A byte that stays saves the same copy wherever it is, but
    generating needs few of the experts. What does not stay is copied in each pass into one of two buffers.
    """

    BUFFERS = 2

    @cached_property
    def units(self) -> int:
        """How many units stay. If the least does not fit into the budget either, as many as the least takes."""
        if self.budget is None or not self.is_streamed:
            return 2 * len(self.layers)
        needed = list(self._needed())
        fitting = [units for units, size in enumerate(needed) if size <= self.budget]
        return fitting[-1] if fitting else needed.index(min(needed))

    def streamed(self, layer: int) -> LayerBytes:
        """Bytes of this layer that are copied."""
        whole, count = self.layers[layer], len(self.layers)
        return LayerBytes(whole.always * (layer >= self.units), whole.experts * (count + layer >= self.units))

    @property
    def kept(self) -> int:
        """Bytes that stay on the device."""
        return self.total - self.copied_a_pass

    @property
    def copied_a_pass(self) -> int:
        """Bytes that a prefill step copies, and each token that is generated."""
        return sum(self.streamed(number).total for number in range(len(self.layers)))

    @property
    def buffers(self) -> int:
        """Bytes of the buffers."""
        return self._buffers([self.streamed(number).total for number in range(len(self.layers))])

    @property
    def peak(self) -> int:
        return self.kept + self.buffers

    def _buffers(self, streamed: list[int]) -> int:
        return min(self.BUFFERS, sum(map(bool, streamed))) * max(streamed, default=0)

    def _needed(self) -> Iterator[int]:
        """Bytes on the device if no unit stays, the first does, the first two, and so on."""
        streamed = [layer.total for layer in self.layers]
        yield self._buffers(streamed)
        for units in ([layer.always for layer in self.layers], [layer.experts for layer in self.layers]):
            for number, unit in enumerate(units):
                streamed[number] -= unit
                yield self.total - sum(streamed) + self._buffers(streamed)
