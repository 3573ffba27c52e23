"""What each of several ranks held in memory and read of the checkpoint: the first one gathers it when a run ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.context import ContextKVCache
from cache.hybrid import HybridKVCache
from l4ctx.machine.memory import ProcessMemory
from model.config import TextConfig
from model.division import TensorRank
from model.transformer import Transformer
from model.weights.cutting import ReadBytes, read_bytes
from model.weights.loading import checked_sources

UNKNOWN = ProcessMemory(-1, -1)


@dataclass(frozen=True)
class RankReport:
    """Bytes of one rank."""

    number: int
    weights: int  # of the text model
    keys_values: int  # in memory, with read buffers
    keys_values_on_disk: int
    read: ReadBytes  # of the text model's weights
    before: ProcessMemory | None  # before weights and cache were made
    peak: ProcessMemory | None

    @classmethod
    def of(
        cls,
        number: int,
        model: Transformer,
        cache: HybridKVCache | ContextKVCache,
        checkpoint: Path,
        rank: TensorRank,
        before: ProcessMemory | None,
        peak: ProcessMemory | None,
    ) -> RankReport:
        """`rank` is the place among those that divide the model. Raises CheckpointError where `checkpoint` changed."""
        config, held = TextConfig.from_folder(checkpoint), cache.held()
        return cls(
            number,
            model.weight_bytes,
            held.total + held.buffers,
            held.nope_disk,
            read_bytes(checked_sources(checkpoint, config), config, rank),
            before,
            peak,
        )

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> RankReport:
        number, weights, held, on_disk, share, replicated, *memory = numbers
        before, peak = (
            None if (found := ProcessMemory(*pair)) == UNKNOWN else found for pair in (memory[:2], memory[2:])
        )
        return cls(number, weights, held, on_disk, ReadBytes(share, replicated), before, peak)

    @property
    def numbers(self) -> list[int]:
        """As many for every rank, which `from_numbers` reads."""
        memory = [(x or UNKNOWN) for x in (self.before, self.peak)]
        return [
            self.number,
            self.weights,
            self.keys_values,
            self.keys_values_on_disk,
            *self.read,
            *(size for x in memory for size in (x.anonymous, x.file_backed)),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rank": self.number,
            "weights": self.weights,
            "keys_values": self.keys_values,
            "keys_values_on_disk": self.keys_values_on_disk,
            "checkpoint_read": self.read._asdict(),
            "process_before": self.before and asdict(self.before),
            "process_peak": self.peak and asdict(self.peak),
        }
