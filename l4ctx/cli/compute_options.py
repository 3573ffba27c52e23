"""The options for how a model computes, and where its weights, keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l4ctx.cli import options

if TYPE_CHECKING:
    from l4ctx.run.choices import AttentionBackend
    from l4ctx.run.request import ComputeOptions, KVOptions


@dataclass(frozen=True)
class MemoryFlags:
    """Forms and memory. A command takes them as one parameter, and is decorated with `l4ctx.cli.sources.spread`."""

    dtype: options.Dtype = "auto"
    quantize: options.Quantize = None
    weights_memory: options.WeightsMemory = None
    weights_device_memory: options.WeightsDeviceMemory = None
    kv_dtype: options.KVDtype = "auto"
    kv_device_memory: options.KVDeviceMemory = None
    kv_host_memory: options.KVHostMemory = None

    def compute(
        self,
        device: str,
        prefill_chunk_size: int | None,
        attention: AttentionBackend | None = None,
        context_ranks: int = 1,
    ) -> ComputeOptions:
        from l4ctx.run.request import ComputeOptions

        return ComputeOptions(
            device,
            self.dtype,
            attention,
            prefill_chunk_size,
            self.quantize,
            self.weights_memory,
            self.weights_device_memory,
            context_ranks,
        )

    def kv(self, folder: Path | None = None) -> KVOptions:
        from l4ctx.run.request import KVOptions

        return KVOptions(self.kv_dtype, self.kv_device_memory, self.kv_host_memory, folder)


@dataclass(frozen=True)
class ComputeFlags(MemoryFlags):
    """The same with all the rest, of commands that read without keeping what was read."""

    kv_dir: options.KVDir = None
    device: options.Device = "auto"
    attention: options.Attention = None
    prefill_chunk_size: options.PrefillChunkSize = None

    def compute_options(self, context_ranks: int = 1) -> ComputeOptions:
        return self.compute(self.device, self.prefill_chunk_size, self.attention, context_ranks)

    def kv_options(self) -> KVOptions:
        return self.kv(self.kv_dir)
