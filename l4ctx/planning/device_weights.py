"""Weights that a device does not hold: what stays there, what host memory holds, and what is copied. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from l4ctx.formatting import human_bytes
from l4ctx.planning.weights import StoredWeights
from l4ctx.planning.workload import Capacity, Workload
from model.weights.owners import Owner
from model.weights.residency import DeviceResidency

OPTION = "--weights-device-memory"


@dataclass(frozen=True)
class DeviceWeights:
    """How the weights share a device and the host."""

    stored: StoredWeights
    dtype: str  # computed in
    in_all: int  # bytes of the text model's weights and the vision tower's, in this dtype
    limit: int  # bytes for weights and their buffers on the device
    is_pinned: bool = True  # what is copied lies in pinned memory, not in the mapped files

    @classmethod
    def of(cls, workload: Workload, limit: int | None) -> DeviceWeights | None:
        """None if all weights stay on the device, or if only their bytes in all are known."""
        in_all = workload.weights + workload.tower_weights
        if workload.stored is None or limit is None or in_all <= limit:
            return None
        return cls(workload.stored, workload.dtype, in_all, limit)

    @cached_property
    def residency(self) -> DeviceResidency:
        return DeviceResidency(self.stored.layers_in(self.dtype), self.layers_budget)

    @property
    def layers_budget(self) -> int:
        """Bytes for layers, without norms, biases and routers, and for the buffers."""
        return max(0, self.limit - self._beside_layers)

    @property
    def on_device(self) -> int:
        return self._beside_layers + self.residency.peak

    @property
    def on_host(self) -> int:
        """Bytes of host memory. Weights that are converted or quantized are all there while they are loaded."""
        if not self.can_stay_mapped:
            return self.in_all
        return self.residency.copied_a_pass if self.is_pinned else 0

    @property
    def can_stay_mapped(self) -> bool:
        """Whether the files hold the layers' weights as they are computed with."""
        return not self.stored.is_made and self.stored.layers_in(self.dtype) == self.stored.layers

    def by_owner(self) -> dict[Owner, int]:
        """Bytes that are copied."""
        found: dict[Owner, int] = dict.fromkeys(Owner, 0)
        for part in self.stored.parts:
            if part.layer is not None and part.owner is not Owner.SMALL:
                streamed = self.residency.streamed(part.layer)
                is_copied = streamed.experts if part.owner is Owner.ROUTED else streamed.always
                found[part.owner] += part.bytes_in(self.dtype) if is_copied else 0
        return found

    def notes(self, capacity: Capacity) -> Iterator[str]:
        """What a user should know, one line each."""
        copied, rate = self.residency.copied_a_pass, self.rate(capacity)
        place = "host memory" if self.is_pinned else "the checkpoint's files"
        yield (
            f"{human_bytes(copied)} of {human_bytes(self.in_all)} of weights are copied from {place} to the "
            f"accelerator for each prefill chunk and for each token of the answer, at least {copied / rate:.2g} s each "
            f"({human_bytes(round(rate))}/s is taken for it); a larger --prefill-chunk-size copies less often"
        )
        if self.on_device > self.limit:
            yield (
                f"{OPTION} {human_bytes(self.limit)} is exceeded: what stays and two buffers take at least "
                f"{human_bytes(self.on_device)}"
            )

    def rate(self, capacity: Capacity) -> float:
        """Bytes a second that are copied."""
        return capacity.copying if self.is_pinned else min(capacity.copying, capacity.reading)

    @property
    def _beside_layers(self) -> int:
        return self.in_all - sum(layer.total for layer in self.stored.layers_in(self.dtype))
