"""Bytes of a run by owner and tier, planned and held. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from l4ctx.machine.memory import ProcessMemory
from l4ctx.planning.memory_plan import MemoryPlan
from l4ctx.planning.placement import PlacedWeights

if TYPE_CHECKING:
    from l4ctx.run.rank_report import RankReport


@dataclass(frozen=True)
class HeldOnDevice:
    """Bytes on one of several devices, at the end of a run."""

    name: str
    layers: range
    weights: int
    rope_windows: int
    nope: int
    peak: int | None  # of all that was allocated there; None where that is not known

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [self.layers.start, self.layers.stop - 1]}


@dataclass(frozen=True)
class MemoryReport:
    """Bytes predicted, held at the end, and at the peak of a run, by owner."""

    predicted: MemoryPlan
    weights: int
    weights_by_owner: list[PlacedWeights]
    rope_windows: int
    nope_device: int
    nope_host: int
    nope_disk: int
    buffers: int
    token_ids: int
    draft_index: int
    weight_buffers: int  # on an accelerator, for weights that do not stay there
    process_before: ProcessMemory | None  # before weights and cache were made
    process: ProcessMemory | None
    process_peak: ProcessMemory | None
    accelerator_peak: int | None  # of all devices together
    pinned: int = 0  # host memory of keys and values that was pinned before it was needed, used or not
    devices: Sequence[HeldOnDevice] = ()  # where layers are on several
    ranks: Sequence[RankReport] = ()  # of several processes, this one first

    def as_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "predicted": self.predicted.as_dict(),
            "devices": [device.as_dict() for device in self.devices],
            "weights_by_owner": [weights.as_dict() for weights in self.weights_by_owner],
            "ranks": [rank.as_dict() for rank in self.ranks],
            "process_before": self.process_before and asdict(self.process_before),
            "process": self.process and asdict(self.process),
            "process_peak": self.process_peak and asdict(self.process_peak),
        }
